"""The attention op at SmolLM2-135M's heads: a backend beside torch's own attention, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.ops.timing import WrongResult, interleaved_us
from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.backend import choose_attention
from loraplex_kernels.testing import worst_excess

CPU = torch.device("cpu")
KV_HEADS, GROUP, HEAD_DIM = 3, 3, 64
PAGE_SIZE = 16
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the printed table."""

    step: str
    us: dict[str, float]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step asks for: (query rows, context) of each sequence."""

    name: str
    sequences: tuple[tuple[int, int], ...]


STEPS = (
    Step("1 decode at 128", ((1, 128),)),
    Step("32 decodes at 128", ((1, 128),) * 32),
    Step("32 decodes at 512", ((1, 512),) * 32),
    Step("31 decodes at 64..250, one at 2,000", (*((1, 64 + 6 * i) for i in range(31)), (1, 2000))),
    Step("a prompt of 256", ((256, 256),)),
    Step("16 decodes at 128, a chunk of 128 at 512", (*((1, 128),) * 16, (128, 512))),
)


def run(backend_name: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Time every step; raises WrongResult before reporting a wrong way's time. ``prepare`` is timed on its own."""
    return [_run_step(step, choose_attention(backend_name, CPU), dtype, repeats) for step in STEPS]


def _run_step(step: Step, backend: AttentionBackend, dtype: torch.dtype, repeats: int) -> Row:
    spans = _spans(step.sequences)
    num_tokens = sum(span.num_queries for span in spans)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(num_tokens, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    cache = _filled(backend, spans, dtype)
    plan = backend.prepare(spans, cache)

    def attend() -> torch.Tensor:
        return backend.attend(q, k, v, layer=0, cache=cache, plan=plan, scale=SCALE, window=None)

    reference = choose_attention("reference", CPU)
    expected_cache = _filled(reference, spans, dtype)
    expected_plan = reference.prepare(spans, expected_cache)
    expected = reference.attend(q, k, v, layer=0, cache=expected_cache, plan=expected_plan, scale=SCALE, window=None)
    excess = worst_excess(attend(), expected, dtype)
    if excess > 1:
        raise WrongResult(f"{backend.name}, {step.name}: {excess:.2f} times the tolerance away from the reference")
    ways: dict[str, Callable[[], object]] = {
        backend.name: attend,
        "sdpa, contiguous, one by one": _sdpa_loop(step.sequences, dtype),
        "prepare": lambda: backend.prepare(spans, cache),
    }
    return Row(step.name, interleaved_us(ways, repeats=repeats, calls=5))


def _spans(sequences: Sequence[tuple[int, int]]) -> list[SequenceSpan]:
    total = sum(-(-context // PAGE_SIZE) for _, context in sequences)
    free = (torch.randperm(total, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    return [
        SequenceSpan(queries, context, [free.pop() for _ in range(-(-context // PAGE_SIZE))])
        for queries, context in sequences
    ]


def _filled(backend: AttentionBackend, spans: list[SequenceSpan], dtype: torch.dtype) -> KVCache:
    """A cache of one layer whose contexts are written; the same numbers for every backend."""
    cache = backend.new_cache(
        num_layers=1,
        num_pages=1 + sum(len(span.pages) for span in spans),
        page_size=PAGE_SIZE,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(3)
    for span in spans:
        whole = SequenceSpan(span.context_len, span.context_len, span.pages)
        k, v = (torch.randn(span.context_len, KV_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in "kv")
        q = k.repeat_interleave(GROUP, 1)
        plan = backend.prepare([whole], cache)
        backend.attend(q, k, v, layer=0, cache=cache, plan=plan, scale=SCALE, window=1)
    return cache


def _sdpa_loop(sequences: Sequence[tuple[int, int]], dtype: torch.dtype) -> Callable[[], None]:
    """What a server without pages or groups would do: heads repeated, no gather, one call for each sequence."""
    heads = KV_HEADS * GROUP
    inputs = [
        (torch.randn(1, heads, n, HEAD_DIM).to(dtype), torch.randn(1, heads, c, HEAD_DIM).to(dtype), n == c)
        for n, c in sequences
    ]

    def way() -> None:
        for q, kv, causal in inputs:
            torch.nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=causal, scale=SCALE)

    return way
