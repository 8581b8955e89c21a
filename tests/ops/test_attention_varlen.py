"""The varlen backend around a kernel that stands for torch's: what it is asked, and when it is not used at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from loraplex_kernels.attention import SequenceSpan, Target
from loraplex_kernels.attention.varlen import VarlenAttention, missing_parameters, refusal
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import CPU, LARGE_PAGE, SUBJECTS, Geometry, Subject, World, dense, spans_of

pytest.importorskip("triton", reason="triton is not installed")

LEAN = Geometry(LARGE_PAGE, 2, 2, 8)
CALLS = Callable[..., torch.Tensor]


def library(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """varlen_attn as torch 2.13 documents it, with the FlashAttention 2 checks that concern this backend."""
    _, page_size, kv_heads, _ = key.shape
    if page_size % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256\nmore of the message")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    integers = (cu_seq_q, cu_seq_k, seqused_k, block_table)
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in integers)
    assert block_table.shape[0] == len(seqused_k) == len(cu_seq_q) - 1 == len(cu_seq_k) - 1
    assert enable_gqa == (query.shape[1] != kv_heads)
    assert query.stride(2) == key.stride(3) == 1
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(seqused_k.max()) <= max_k
    out = torch.zeros(query.shape, dtype=query.dtype)
    left, right = window_size
    for index, used in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        if not used:
            continue
        pages = block_table[index, : -(-used // page_size)].long()
        sides = (side[pages].flatten(0, 1)[:used].double().transpose(0, 1) for side in (key, value))
        keys, values = (side.repeat_interleave(query.shape[1] // kv_heads, 0) for side in sides)
        at = torch.arange(used - (rows.stop - rows.start), used)[:, None]
        there = torch.arange(used)[None, :]
        seen = torch.ones(len(at), used, dtype=torch.bool)
        if right >= 0:
            seen &= there <= at + right
        if left >= 0:
            seen &= there >= at - left
        rows_q = query[rows].double().transpose(0, 1)
        attended = torch.nn.functional.scaled_dot_product_attention(rows_q, keys, values, attn_mask=seen, scale=scale)
        out[rows] = attended.transpose(0, 1).to(query.dtype)
    return out


def make_world(kernel: CALLS = library, window: int | None = None) -> World:
    entry = SUBJECTS["reference"]
    return World(Subject(VarlenAttention(kernel), torch.float16, entry), LEAN, torch.float16, window, num_pages=8)


@pytest.mark.parametrize("window", [None, 1, 20])
def test_chunks_decodes_and_static_plans(window: int | None) -> None:
    world = make_world(window=window)
    first, second = world.add(280), world.add(30)
    for chunks in ([(first, 260), (second, 3)], [(second, 1), (first, 15)], [(first, 1), (second, 1)]):
        starts = [seq.done for seq, _ in chunks]
        for (seq, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
            assert worst_excess(out, dense(seq, start, start + count, window), world.dtype) <= 1
    plan = world.backend.static_plan(world.cache, 3, 2)
    assert plan is not None
    step = partial(world.backend.attend, layer=1, cache=world.cache, plan=plan, scale=0.3, window=window)
    assert not step(*world.rows([], 3)).any()
    for chosen in ([first], [second, first]):
        parts = [(seq, slice(seq.done, seq.done + 1)) for seq in chosen]
        assert plan.set(spans_of(parts))
        out = step(*world.rows(parts, 3))
        for row, (seq, rows) in zip(out, parts, strict=False):
            assert worst_excess(row[None], dense(seq, rows.start, rows.stop, window), world.dtype) <= 1
            seq.done += 1
        assert not out[len(chosen) :].any()
    assert not plan.set([SequenceSpan(2, 2, [1])])
    assert not plan.set([SequenceSpan(1, 600, [1, 2, 3])])
    assert not plan.set(spans_of([(first, slice(1, 2))] * 4))


def test_decodes_alone_are_not_called_causal() -> None:
    """The library takes the heads of a group together only without a window of any kind."""
    asked: list[tuple[int, int]] = []

    def listening(*args: object, window_size: tuple[int, int], **options: object) -> torch.Tensor:
        asked.append(window_size)
        return library(*args, window_size=window_size, **options)  # type: ignore[arg-type]

    for window, expected in ((None, [(-1, -1), (-1, 0)]), (5, [(4, 0), (4, 0)])):
        world = make_world(listening, window)
        first, second = world.add(9), world.add(9)
        world.step([(first, 5)])
        asked.clear()
        world.step([(first, 1), (second, 4)])
        assert asked == expected


HALF = Target(CPU, torch.float16, LARGE_PAGE)


def broken(wrong: Callable[[torch.Tensor, int], object]) -> CALLS:
    def kernel(*args: object, **options: object) -> torch.Tensor:
        out = library(*args, **options)  # type: ignore[arg-type]
        wrong(out, int(args[5]))  # type: ignore[call-overload]
        return out

    return kernel


def test_the_probe_passes_what_is_right() -> None:
    assert refusal(VarlenAttention(library), HALF) is None


@pytest.mark.parametrize(
    ("kernel", "target", "reason"),
    [
        (library, Target(CPU, torch.float16, 16), "Paged KV cache block size must be divisible by 256"),
        (library, Target(CPU, torch.float32, 256), "FlashAttention only support fp16 and bf16 data type"),
        (broken(lambda out, most: out.mul_(-1) if most > 1 else None), HALF, "its result for a prefill chunk"),
        (broken(lambda out, most: out.mul_(-1) if most == 1 else None), HALF, "its result for a decode is wrong"),
        (broken(lambda out, most: out[1:].fill_(1) if most == 1 else None), HALF, "a row without keys"),
        (broken(lambda out, most: out[1:].fill_(float("nan")) if most == 1 else None), HALF, "a row without keys"),
    ],
)
def test_the_probe_says_what_is_wrong(kernel: CALLS, target: Target, reason: str) -> None:
    said = refusal(VarlenAttention(kernel), target)
    assert said is not None
    assert said.startswith(reason)
    assert "\n" not in said


def test_older_signatures_are_known_by_what_they_lack() -> None:
    def older(query: object, key: object, *, scale: float, window_size: object) -> None: ...

    assert missing_parameters(older) == ("enable_gqa", "seqused_k", "block_table")
    assert missing_parameters(library) == ()
