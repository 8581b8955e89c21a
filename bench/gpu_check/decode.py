"""A whole engine over an 8B-shaped model, and the time of its decode steps: what the sections on speed share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check.captures import capture_for
from bench.gpu_check.section import Setting
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.engine.build import Load, Means, build_core
from loraplex.engine.local import LocalEngine
from loraplex.models.base import BaseModel
from loraplex.types import AdapterRef, Request, SamplingParams, StopRule


@dataclass(frozen=True, slots=True)
class Steps:
    """What is timed of a batch: ``timed`` decode steps, after prompts and ``warm`` steps."""

    prompt_tokens: int
    timed: int
    warm: int


FULL = Steps(prompt_tokens=64, timed=40, warm=4)
DRY = Steps(prompt_tokens=5, timed=2, warm=1)


def steps_for(setting: Setting) -> Steps:
    """How long a batch is watched."""
    return DRY if setting.dry else FULL


def engine_for(
    setting: Setting,
    model_dir: Path,
    backend: str,
    max_num_seqs: int,
    loader: Callable[[BaseModel], Load],
    *,
    quantization: str = "",
) -> LocalEngine:
    """With decode graphs, and adapters that ``loader`` makes. ``model_dir`` has a config alone; ``quantization``:
    what its weights are quantized to, if anything."""
    gib = 1 << 30
    config = Config(
        model=ModelConfig(
            model=str(model_dir),
            device=setting.device.type,
            dtype=str(setting.dtype).removeprefix("torch."),
            load_format="dummy",
            quantization=quantization,
            max_model_len=(64 if setting.dry else 512),
        ),
        engine=EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64 if setting.dry else 4096,
            prefix_cache=False,  # the same prompts come again and again
            kv_cache_memory=(1 << 20) if setting.dry else 12 * gib,
            lora_backend=backend,
            attention_backend="triton" if setting.dry else "auto",
            graphs="on",
        ),
        adapters=AdaptersConfig(adapter_memory=(1 << 24) if setting.dry else 14 * gib),
    )
    means = Means(capture_for(setting.device), lambda _config, model: loader(model))
    core = build_core(config, model_dir, "dummy", progress=lambda *_: None, wake=lambda: None, means=means)
    return LocalEngine(core)


def decode_s(engine: LocalEngine, steps: Steps, adapters: tuple[str, ...]) -> float:
    """Seconds of a decode step of ``len(adapters)`` requests, all of them past their prompts."""
    tickets = [engine.submit(request_of(index, name, steps)) for index, name in enumerate(adapters)]
    generations = [engine.generations[ticket] for ticket in tickets]

    def turn_until(tokens: int) -> None:
        while min(len(generation.token_ids) for generation in generations) < tokens:
            engine.turn()
            failed = next((g.failure for g in generations if g.failure is not None), None)
            if failed is not None:
                raise failed.to_error()

    turn_until(steps.warm)
    # the first request of a large batch is some steps ahead of the last: count what all of them get
    before = sum(len(generation.token_ids) for generation in generations)
    start = time.perf_counter()
    turn_until(steps.warm + steps.timed)
    seconds = time.perf_counter() - start
    tokens = sum(len(generation.token_ids) for generation in generations) - before
    for ticket in tickets:
        engine.abort(ticket)
    engine.run_until_idle()
    for ticket in tickets:
        del engine.generations[ticket]
    return seconds / (tokens / len(adapters))


def request_of(index: int, adapter: str, steps: Steps) -> Request:
    """The request of row ``index`` of a batch; it goes on for longer than it is timed."""
    prompt = tuple((index * 31 + position * 7) % 89 for position in range(steps.prompt_tokens))
    return Request(
        request_id="check",
        prompt_token_ids=prompt,
        adapters=(AdapterRef(adapter),) if adapter else (),
        sampling=SamplingParams(temperature=0.0, seed=0),
        stop=StopRule(max_tokens=steps.warm + steps.timed + 64, ignore_eos=True),
    )
