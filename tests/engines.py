"""Engines over tiny checkpoints for tests: in process, with adapters that PEFT made."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.engine.build import Load, Means, build_core
from loraplex.engine.graphs import GraphCapture
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.ranks.others import Others
from loraplex.models.base import BaseModel
from loraplex.types import AdapterRef, Request, StopRule
from tests.oracle import ALL_LINEAR, make_adapter
from tests.streams import overlap
from tests.tiny import prompt

#: of each of ``mixed_requests``
MAX_TOKENS = 12

#: six adapters of different ranks, targets and scalings, as PEFT keyword arguments
SIX_ADAPTERS: Mapping[str, Mapping[str, object]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "stabilized": {"r": 16, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterned": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj", "down_proj", "up_proj"],
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"layers.1.mlp.up_proj": 1},
    },
    "vocabulary": {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    "one": {"r": 1, "lora_alpha": 2, "target_modules": ["down_proj"], "layers_to_transform": [1]},
}


def make_adapters(base_dir: Path, out_dir: Path, names: tuple[str, ...] = tuple(SIX_ADAPTERS)) -> dict[str, Path]:
    """Adapter directories by name, made once per ``out_dir``."""
    made = {}
    for seed, name in enumerate(names):
        path = out_dir / name
        if not path.exists():
            make_adapter(base_dir, path, seed=seed, **SIX_ADAPTERS[name])
        made[name] = path
    return made


def local_engine(
    base_dir: Path,
    *,
    adapter_dirs: tuple[Path, ...] = (),
    dtype: str = "float32",
    device: str = "cpu",
    capture: GraphCapture | None = None,
    make_load: Callable[[Config, BaseModel], Load] | None = None,
    others: Callable[[Config], Others] | None = None,
    mode: str = "none",
    **engine: object,
) -> LocalEngine:
    """An engine in this thread; ``mode`` is how its steps overlap (``tests/streams.py``), ``engine`` are fields of
    EngineConfig, ``adapter_memory``, ``device`` and ``quantization``."""
    memory, device = engine.pop("adapter_memory", 1 << 26), str(engine.pop("device", "cpu"))
    model = ModelConfig(
        model=str(base_dir),
        device=device,
        dtype=dtype,
        tensor_parallel_size=int(engine.pop("tensor_parallel_size", 1)),  # type: ignore[call-overload]
        quantization=str(engine.pop("quantization", "")),
    )
    config = Config(
        model=model,
        engine=EngineConfig(**{"kv_cache_memory": 1 << 22, **engine}),  # type: ignore[arg-type]
        adapters=AdaptersConfig(adapter_memory=memory, adapter_dirs=tuple(map(str, adapter_dirs))),  # type: ignore[arg-type]
    )
    means = Means(capture, make_load, None if others is None else others(config))
    core = build_core(config, base_dir, "tiny", progress=lambda *_: None, wake=lambda: None, means=means)
    overlap(core._steps.executor.runner, mode)
    return LocalEngine(core)


def in_random_arrival(
    engine: LocalEngine, requests: Iterable[Request], rng: random.Random, *, most: int
) -> list[Generation]:
    """What becomes of the requests when 0 to ``most`` turns lie between one and the next."""
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        for _ in range(rng.randint(0, most)):
            engine.turn()
    engine.run_until_idle()
    return [engine.generations[ticket] for ticket in tickets]


def mixed_requests(seed: int, count: int = 24) -> list[Request]:
    """Random prompts over six adapters and the base; half share a prefix long enough for the prefix cache."""
    rng = random.Random(seed)
    names = [None, *SIX_ADAPTERS]
    requests = []
    for index in range(count):
        name = names[index % len(names)] if index < len(names) else rng.choice(names)
        shared = prompt(20, seed=99) if rng.random() < 0.5 else ()
        requests.append(
            Request(
                f"r{index}",
                shared + prompt(rng.randint(1, 30), seed=seed * 100 + index),
                adapters=() if name is None else (AdapterRef(name),),
                stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True),
            )
        )
    return requests
