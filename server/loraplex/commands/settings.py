"""From argv and a TOML file to a ``Config``: one table of flags, sizes with units, unknown keys refused by name."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from loraplex.config import MAX_THREADS, Config, default_cache_dir, torchrun_settings
from loraplex.errors import InvalidConfig

_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")

#: those of quant/formats.py, which needs torch: the command line does not
QUANTIZATIONS: Final = ("none", "nf4", "fp4", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of ``serve`` and the configuration key it sets. ``parse`` raises argparse.ArgumentTypeError."""

    name: str
    section: str
    key: str
    parse: Callable[[str], object]
    help: str
    choices: tuple[str, ...] = ()
    repeats: bool = False


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "512MB", "1048576". Units of 1000 (kB, MB, GB) and of 1024 (KiB, MiB, GiB)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a number and a unit, such as 2GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_named_source(text: str) -> tuple[str, str]:
    """NAME=SOURCE as a pair."""
    name, separator, source = text.partition("=")
    if not (name and separator and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE, such as fr=/adapters/fr")
    return name, source


def parse_natural(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def parse_positive(text: str) -> int:
    """A whole number of 1 or more."""
    if (value := parse_natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too small; at least 1 is needed")
    return value


def _threads(text: str) -> int:
    if (value := parse_natural(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{value} is too many; allowed are 0 (one per core) to {MAX_THREADS}")
    return value


def _port(text: str) -> int:
    if (value := parse_natural(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port; allowed are 0 (any free one) to 65535")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of 0 or more")
    return value


FLAGS: Final = (
    Flag("--model", "model", "model", str, "demo, a model directory, or a hub id (default demo)"),
    Flag("--revision", "model", "revision", str, "revision of a hub id"),
    Flag("--device", "model", "device", str, "where to compute", ("auto", "cpu", "cuda")),
    Flag("--dtype", "model", "dtype", str, "compute dtype", ("auto", "float32", "bfloat16", "float16")),
    Flag(
        "--quantization",
        "model",
        "quantization",
        str,
        "quantize a dense checkpoint at load; none serves a quantized one dense",
        QUANTIZATIONS,
    ),
    Flag("--load-format", "model", "load_format", str, "weight files", ("auto", "safetensors", "gguf", "dummy")),
    Flag("--tensor-parallel-size", "model", "tensor_parallel_size", parse_positive, "ranks that share each layer"),
    Flag("--threads", "model", "threads", _threads, "compute threads (0 = one per core)"),
    Flag("--max-model-len", "model", "max_model_len", parse_natural, "longest sequence (0 = the model's own)"),
    Flag("--max-num-seqs", "engine", "max_num_seqs", parse_positive, "sequences in a step"),
    Flag(
        "--max-num-batched-tokens",
        "engine",
        "max_num_batched_tokens",
        parse_natural,
        "tokens in a step (0 = by device)",
    ),
    Flag("--max-waiting", "engine", "max_waiting", parse_natural, "requests that may wait for a place"),
    Flag(
        "--kv-cache-memory",
        "engine",
        "kv_cache_memory",
        parse_size,
        "KV cache and states of each rank, such as 2GiB (default: by device)",
    ),
    Flag("--lora-backend", "engine", "lora_backend", str, "backend of the adapter op (default auto)"),
    Flag("--attention-backend", "engine", "attention_backend", str, "backend of attention (default auto)"),
    Flag("--quant-backend", "engine", "quant_backend", str, "backend of quantized products (default auto)"),
    Flag("--conv-backend", "engine", "conv_backend", str, "backend of causal convolutions (default auto)"),
    Flag("--ssd-backend", "engine", "ssd_backend", str, "backend of state-space scans (default auto)"),
    Flag("--graphs", "engine", "graphs", str, "captured CUDA graphs for decode steps", ("auto", "on", "off")),
    Flag(
        "--adapter-memory",
        "adapters",
        "adapter_memory",
        parse_size,
        "device memory for adapters, of each rank, such as 1GiB",
    ),
    Flag("--adapter-dir", "adapters", "adapter_dirs", str, "directory that sources may lie in", repeats=True),
    Flag("--adapter", "adapters", "preload", parse_named_source, "NAME=SOURCE to load at start", repeats=True),
    Flag("--nnodes", "nodes", "nnodes", parse_positive, "machines that share the ranks (default 1)"),
    Flag("--node-rank", "nodes", "node_rank", parse_natural, "which of them this is; 0 answers requests"),
    Flag("--rdzv-endpoint", "nodes", "rdzv_endpoint", str, "where they meet: HOST:PORT of the first machine"),
    Flag("--rdzv-timeout", "nodes", "rdzv_timeout_s", _seconds, "how long they wait for each other (default 300)"),
    Flag("--host", "server", "host", str, "address to listen on (default 127.0.0.1)"),
    Flag("--port", "server", "port", _port, "port to listen on, 0 for a free one (default 50051)"),
    Flag("--metrics-host", "server", "metrics_host", str, "address of /metrics (default 127.0.0.1)"),
    Flag("--metrics-port", "server", "metrics_port", _port, "port of /metrics, 0 for a free one (default 9400)"),
    Flag("--drain-seconds", "server", "drain_s", _seconds, "how long a drain waits for running requests"),
    Flag(
        "--engine-restarts",
        "server",
        "engine_restarts",
        parse_natural,
        "times in a minute that a dead engine is started anew (default 3, 0 = never)",
    ),
    Flag(
        "--default-max-tokens", "server", "default_max_tokens", parse_positive, "max_tokens of requests that set none"
    ),
    Flag("--log-format", "server", "log_format", str, "log lines", ("text", "json")),
    Flag("--log-level", "server", "log_level", str, "least severe log lines", ("debug", "info", "warning", "error")),
    Flag("--cache-dir", "", "cache_dir", str, "where converted and downloaded models are kept"),
)
_SIZE_KEYS: Final = frozenset((flag.section, flag.key) for flag in FLAGS if flag.parse is parse_size)
_METAVARS: Final = {"adapter": "NAME=SOURCE", "adapter-dir": "DIR", "model": "demo|DIR|HUB_ID", "cache-dir": "DIR"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of the table, ``--config`` and the switches. Unset flags stay None."""
    parser.add_argument("--config", metavar="FILE.toml", help="settings by section; flags win over the file")
    for flag in FLAGS:
        name = flag.name.removeprefix("--")
        parser.add_argument(
            flag.name,
            dest=_dest(flag),
            type=flag.parse,
            help=flag.help,
            choices=flag.choices or None,
            action="append" if flag.repeats else "store",
            metavar=None if flag.choices else _METAVARS.get(name, name.rsplit("-", 1)[-1].upper()),
        )
    for name, dest, text in (
        ("--allow-adapter-templates", "adapters.allow_templates", "render chat templates of adapters (default off)"),
        ("--reflection", "server.reflection", "gRPC server reflection (default on)"),
        ("--prefix-cache", "engine.prefix_cache", "share the KV cache of equal prefixes (default on)"),
    ):
        parser.add_argument(name, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)


def build_config(args: argparse.Namespace) -> Config:
    """The configuration that the file and the flags say. Raises InvalidConfig naming the file and the key."""
    file = Path(args.config) if args.config else None
    settings = _read_toml(file) if file else {}
    for dest, value in vars(args).items():
        section, separator, key = dest.rpartition(".")
        if not separator or value is None:
            continue
        _section(settings, section, file)[key] = value
    _add_torchrun(_section(settings, "nodes", file))
    for section, key in _SIZE_KEYS:
        table = _section(settings, section, file)
        if isinstance(table.get(key), str):
            table[key] = _size_of_file(table[key], f"{file}: {section}.{key}")
    adapters = _section(settings, "adapters", file)
    preload = adapters.get("preload")
    if isinstance(preload, dict):
        adapters["preload"] = list(preload.items())
    settings.setdefault("cache_dir", str(default_cache_dir()))
    try:
        return msgspec.convert(settings, Config)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{file or 'flags'}: {error}") from error


def _add_torchrun(nodes: Settings) -> None:
    """What torchrun's environment says and neither the file nor a flag does."""
    parsers = {flag.key: flag.parse for flag in FLAGS if flag.section == "nodes"}
    for key, (variable, text) in torchrun_settings().items():
        try:
            nodes.setdefault(key, parsers[key](text) if key in parsers else text == "True")
        except argparse.ArgumentTypeError as error:
            raise InvalidConfig(f"{variable}: {error}", field=key) from error


Settings = dict[str, object]  # nested TOML tables; msgspec checks them


def _dest(flag: Flag) -> str:
    return f"{flag.section}.{flag.key}"


def _section(settings: Settings, section: str, file: Path | None) -> Settings:
    """The table of a section; the root for ""."""
    table = settings.setdefault(section, {}) if section else settings
    if not isinstance(table, dict):
        raise InvalidConfig(f"{file}: {section} must be a table: [{section}]")
    return table


def _size_of_file(text: object, where: str) -> int:
    try:
        return parse_size(str(text))
    except argparse.ArgumentTypeError as error:
        raise InvalidConfig(f"{where}: {error}") from error


def _read_toml(file: Path) -> Settings:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"--config {file}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"--config {file}: not valid TOML: {error}") from error
