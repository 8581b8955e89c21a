"""One decoder layer of a decode step under a graph: what a layer costs without adapters, and what they add to it.

Two models of different depth are captured whole; a layer is the difference, so that the embedding, the last norm and
whatever a replay costs fall out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.gpu_check.captures import capture_for
from bench.gpu_check.dummy import random_writes, shape_of, write_config
from bench.gpu_check.section import Row, Section, Setting
from bench.ops.timing import stopwatch_for
from loraplex.config import ModelConfig
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex.models.loader import load_model, plan_model
from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.backend import AUTO, LORA, choose_attention, choose_lora, choose_quant
from loraplex_kernels.lora import LoraBackend, StepPlan
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows

PAGE_SIZE = 16
RANK = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Depths whose difference is measured, decode batches, distinct adapters, context and repeats."""

    depths: tuple[int, int]
    cells: tuple[tuple[int, int], ...]
    context: int
    repeats: int


FULL = Sizes((2, 6), ((1, 1), (8, 8), (32, 1), (32, 8), (32, 32), (128, 32)), context=256, repeats=30)
DRY = Sizes((1, 2), ((3, 2),), context=20, repeats=1)


@dataclass(frozen=True, slots=True)
class Stack:
    """A model of some depth with its backends, cache and adapters in slots 0, 1, ..."""

    model: BaseModel
    lora: LoraBackend
    attention: AttentionBackend
    cache: KVCache


def run(setting: Setting) -> Iterator[Row]:
    """A row for each backend and cell: microseconds of a layer without and with adapters."""
    sizes = DRY if setting.dry else FULL
    for backend in (name for name in LORA if name.startswith("triton")):
        with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
            stacks = [_stack(setting, sizes, backend, depth, Path(folder)) for depth in sizes.depths]
        for batch, distinct in sizes.cells:
            plan = plan_rows((1, (Term(row * distinct // batch),)) for row in range(batch))
            bare, adapted = (_layer_us(setting, sizes, stacks, p) for p in (SegmentPlan(batch, ()), plan))
            yield {
                "backend": backend,
                "rank": RANK,
                "batch": batch,
                "distinct": distinct,
                "layer_us": bare,
                "with_adapters_us": adapted,
                "adapters_add_us": adapted - bare,
            }


def _stack(setting: Setting, sizes: Sizes, backend: str, depth: int, folder: Path) -> Stack:
    shape = replace(shape_of(setting.dry), num_layers=depth)
    lora = choose_lora(backend, setting.device)
    attention = choose_attention("triton" if setting.dry else "auto", setting.device)
    config = ModelConfig(
        model=str(folder),
        device=setting.device.type,
        dtype=str(setting.dtype).removeprefix("torch."),
        load_format="dummy",
    )
    plan = plan_model(write_config(shape, folder), config)
    runtime = Runtime(lora, attention, 1 << 36, quant=choose_quant(AUTO, setting.device))
    model = load_model(plan, runtime, lambda *_: None)
    spec = model.kv_spec()
    cache = attention.new_cache(
        num_layers=spec.num_layers,
        num_pages=1 + _pages(sizes) * max(batch for batch, _ in sizes.cells),
        page_size=PAGE_SIZE,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    writes = random_writes(model, 4 if setting.dry else RANK)
    for slot in range(max(distinct for _, distinct in sizes.cells)):
        for write in writes:
            write.table.write(slot, write.packed)
    return Stack(model, lora, attention, cache)


def _pages(sizes: Sizes) -> int:
    return -(-sizes.context // PAGE_SIZE)


def _layer_us(setting: Setting, sizes: Sizes, stacks: list[Stack], plan: SegmentPlan) -> float:
    """Median of the differences, each pair replayed one after the other."""
    stopwatch = stopwatch_for(setting.device)
    with torch.inference_mode():
        shallow, deep = (_captured(setting, sizes, stack, plan) for stack in stacks)
        differences = []
        for _ in range(sizes.repeats + 1):
            pair = [stopwatch.elapsed_s(replay) for replay in (shallow, deep)]
            differences.append(pair[1] - pair[0])
    return statistics.median(differences[1:]) / (sizes.depths[1] - sizes.depths[0]) * 1e6


def _captured(setting: Setting, sizes: Sizes, stack: Stack, plan: SegmentPlan) -> Callable[[], object]:
    attention = stack.attention.static_plan(stack.cache, plan.num_rows, _pages(sizes))
    adapters = stack.lora.static_plan(plan.num_rows, plan.num_rows)
    assert attention is not None
    assert adapters is not None
    pages = _pages(sizes)
    spans = [
        SequenceSpan(1, sizes.context, range(1 + row * pages, 1 + (row + 1) * pages)) for row in range(plan.num_rows)
    ]
    assert attention.set(spans)
    assert not plan.segments or adapters.set(plan)
    step_plan: StepPlan = adapters if plan.segments else stack.lora.prepare(plan)
    device = stack.model.device
    forward = ForwardBatch(
        token_ids=torch.zeros(plan.num_rows, dtype=torch.int64, device=device),
        positions=torch.full((plan.num_rows,), sizes.context - 1, device=device),
        attention=attention,
        kv_cache=stack.cache,
        adapters=step_plan,
    )

    def step() -> None:
        stack.model.forward(forward)

    return capture_for(setting.device).capture(step)


SECTION = Section("layer", run, 30.0)
