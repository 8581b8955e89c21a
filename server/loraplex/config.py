"""Every setting of a server, as frozen values by concern. Built once from argv, a TOML file and the environment
by ``cli.py`` through ``load``; nothing else reads ``os.environ``. Each object of the server gets the slice it needs.

Sizes are bytes, times are seconds. ``auto`` is resolved in one place, where the thing is built, and logged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

#: more threads than any machine has cores; far more crash the engine at its start
MAX_THREADS: Final = 1024
#: the network interface that leads to nowhere else
LOOPBACK: Final = "lo"

_FOR_TORCHRUN: Final = {"nnodes": "PET_NNODES", "node_rank": "PET_NODE_RANK", "rdzv_endpoint": "PET_RDZV_ENDPOINT"}
_INSIDE_TORCHRUN: Final = {
    "nnodes": "WORLD_SIZE",
    "node_rank": "RANK",
    "external_store": "TORCHELASTIC_USE_AGENT_STORE",
}

Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Threads = Annotated[int, msgspec.Meta(ge=0, le=MAX_THREADS)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which base model, and how its weights are held."""

    model: str = "demo"
    revision: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = ""
    load_format: str = "auto"
    tensor_parallel_size: Positive = 1
    threads: Threads = 0
    max_model_len: Natural = 0


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scheduling and memory of the engine."""

    max_num_seqs: Positive = 64
    #: 0: what suits the device (``engine/defaults.py``)
    max_num_batched_tokens: Natural = 0
    max_waiting: Natural = 1024
    #: 0: what suits the device
    kv_cache_memory: Natural = 0
    kv_page_size: Positive = 16
    prefix_cache: bool = True
    lora_backend: str = "auto"
    attention_backend: str = "auto"
    quant_backend: str = "auto"
    conv_backend: str = "auto"
    ssd_backend: str = "auto"
    #: decode under captured graphs: auto is wherever the device and the backends can
    graphs: Literal["auto", "on", "off"] = "auto"


class AdaptersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where adapters may come from, and how much memory they may take."""

    adapter_memory: Natural = 1 << 30
    adapter_dirs: tuple[str, ...] = ()
    #: (name, source) pairs loaded at start
    preload: tuple[tuple[str, str], ...] = ()
    max_adapter_bytes: Natural = 8 << 30
    #: whether chat templates that adapters ship are rendered: they are code, bounded in what they reach, not in time
    allow_templates: bool = False


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network face."""

    host: str = "127.0.0.1"
    port: Port = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 9400
    reflection: bool = True
    drain_s: Seconds = 30.0
    #: how often within a minute a dead engine is started anew; 0: never, the server says NOT_SERVING for good
    engine_restarts: Natural = 3
    max_message_bytes: Positive = 1 << 20
    max_concurrent_streams: Positive = 4096
    default_max_tokens: Positive = 128
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class NodesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machines that share the ranks, each with as many of them. Names are torchrun's."""

    nnodes: Positive = 1
    node_rank: Natural = 0
    #: HOST:PORT on the first machine where all of them meet
    rdzv_endpoint: str = ""
    #: how long machines wait for each other
    rdzv_timeout_s: Seconds = 300.0
    #: somebody else, such as torchrun, keeps the store at the endpoint; else the first machine does
    external_store: bool = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration of one server, or of a further machine of one."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    server: ServerConfig = ServerConfig()
    nodes: NodesConfig = NodesConfig()
    cache_dir: str = ""

    @property
    def ranks_here(self) -> int:
        """Ranks on each machine."""
        return self.model.tensor_parallel_size // self.nodes.nnodes


def default_cache_dir() -> Path:
    """``$LORAPLEX_CACHE``, else ``$XDG_CACHE_HOME/loraplex``, else ``~/.cache/loraplex``."""
    own = os.environ.get("LORAPLEX_CACHE")
    if own:
        return Path(own)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "loraplex"


def torchrun_settings(environment: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """What torchrun, or who sets its environment, says of machines: key of ``NodesConfig`` -> (variable, its text).

    Inside torchrun each of its processes is a machine here. Outside, the variables are those that torchrun itself reads
    in place of its flags (PET_NNODES, ...), as cluster managers set them.
    """
    environment = os.environ if environment is None else environment
    inside = "TORCHELASTIC_RUN_ID" in environment
    names = _INSIDE_TORCHRUN if inside else _FOR_TORCHRUN
    found = {key: (name, environment[name]) for key, name in names.items() if environment.get(name)}
    host, port = ("MASTER_ADDR", "MASTER_PORT") if inside else ("PET_MASTER_ADDR", "PET_MASTER_PORT")
    if "rdzv_endpoint" not in found and environment.get(host) and environment.get(port):
        found["rdzv_endpoint"] = (f"{host} and {port}", f"{environment[host]}:{environment[port]}")
    return found


def quiet_torch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch, which is not imported yet, keep the stack traces of its warnings to itself: it prints one for each
    store that goes, and for each address without a name. What matters is raised."""
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def engine_environment(threads: int, ranks: int = 1, interface: str = "") -> dict[str, str]:
    """The environment of the engine process, and of those of its ``ranks`` on this machine: this one's, with the
    compute threads of each set (0 = one per core, shared out). ``interface``: of the network that the ranks meet over.

    The engine imports from where this process does and from nowhere else, so that both run the same code.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["PYTHONSAFEPATH"] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(threads or max((os.cpu_count() or 1) // ranks, 1)))
    # Compute threads that spin while they wait for each other stall for milliseconds when another process holds a
    # core, as a front end and its clients do: with 2 threads on 2 busy cores a step took 1,430 ms spinning, 88 ms not.
    # Those that sleep at once pay for every waking, which on a virtual machine is dear: 32 streams ran 476 tokens/s
    # sleeping, 756 after a spin of 3,000 turns, 270 spinning. A load beside streams wants those turns for itself: this
    # is about as many as leave the gaps of streams below two steps (docs/PERFORMANCE.md).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "700")
    quiet_torch(environment)
    if interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != LOOPBACK:  # on one machine NCCL finds its own way
            environment.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    # The matrix library keeps compiled code for each shape it met, 1 MB apiece, 1,024 by default and in two caches:
    # mixed traffic grew an engine by 870 MB. With 128 it grows by 160 MB and is as fast.
    environment.setdefault("LRU_CACHE_CAPACITY", "128")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    return environment
