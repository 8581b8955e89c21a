"""The checks of the device kernels can fail: each plausible bug, made once in the kernels' text, turns them red."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import expected_input, expected_output, random_factors, random_scale, worst_excess
from tests.ops.lora_device import SMALL_FORMS, Recorder, load_kernels, make_lora
from tests.ops.lora_subjects import BIG, CPU
from tests.ops.mutants import Ward, text_of

triton = pytest.importorskip("triton", reason="the package triton is not installed")

IN, PARTS = 41, (24, 20)
#: what it breaks -> (text of the kernels, what stands there instead, the check that must turn red)
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "weight dropped": ("(weight * h_tile)", "h_tile", "two launches"),
    "weight dropped from scales": ("scales += weight * (", "scales += (", "two launches"),
    "weight dropped from shifts": ("shifts += weight * ", "shifts += ", "two launches"),
    "scales dropped": ("* scales[None, :] + acc", "+ acc", "two launches"),
    "shifts dropped": (" + shifts[None, :]", "", "two launches"),
    "scales without their one": ("mask=n_ok, other=1.0) - 1.0)", "mask=n_ok, other=1.0))", "two launches"),
    "a segment shifted by a row in x": (
        "x_rows = x + (first_row + rows)",
        "x_rows = x + (first_row + rows + 1)",
        "two launches",
    ),
    "a segment shifted by a row in y": (
        "y + first_row.to(tl.int64) * width",
        "y + (first_row + 1).to(tl.int64) * width",
        "two launches",
    ),
    "a row too many": ("row_ok = rows < num_rows\n        ns", "row_ok = rows <= num_rows\n        ns", "two launches"),
    "last item skipped": (
        "tl.load(meta) * num_columns, tl.num",
        "tl.load(meta) * num_columns - 1, tl.num",
        "two launches",
    ),
    "last partial rank tile skipped": (
        "num_tiles = tl.cdiv(num_ranks, BLOCK_R)",
        "num_tiles = tl.maximum(1, num_ranks // BLOCK_R)",
        "two launches",
    ),
    "last partial chunk of ranks skipped": (
        "tl.range(0, num_ranks, BLOCK_C",
        "tl.range(0, tl.maximum(1, num_ranks - BLOCK_C + 1), BLOCK_C",
        "two launches",
    ),
    "y overwritten": ("total = y_tile.to(tl.float32)", "total = 0 * y_tile.to(tl.float32)", "two launches"),
    "one plane too few": ("tl.static_range(1, SPLITS)", "tl.static_range(1, SPLITS - 1)", "two launches"),
    "one plane counted twice": ("h + split * plane", "h + (split - 1) * plane", "two launches"),
    "second part's ranks at the first's": ("h_stride + first_rank\n", "h_stride\n", "two launches"),
    "last columns of x unmasked": ("k_ok = ks < in_features", "k_ok = ks < in_features + 1", "two launches"),
    "splits overlap": ("(split + 1) * CHUNK", "(split + 1) * CHUNK + BLOCK_K", "two launches"),
    "ranks of h unmasked": ("(rank + ranks < num_ranks)", "(rank + ranks <= num_ranks)", "two launches"),
    "ranks of B a chunk late": ("b_tile, b_next = b_next, b_tile", "b_next = b_tile", "two launches"),
    "first ranks of B skipped": ("rank + BLOCK_C * AHEAD + ranks", "rank + BLOCK_C + 1 + ranks", "two launches"),
    "one term too few": (
        "first_pair + num_pairs):\n            pair = pairs + index * PAIR\n            weight",
        "first_pair + tl.minimum(num_pairs, 1)):\n            pair = pairs + index * PAIR\n            weight",
        "two launches",
    ),
    "wrong id": ("+ id_rows[:, None]", "+ id_rows[:, None] * 0", "lookup"),
    "wrong row of A looked up": ("(first_rank + rank + ranks)", "(rank + ranks)", "lookup"),
    "input scale unweighted": ("factor += weight * (", "factor += (", "input"),
    "rows without adapters not copied": ("tl.load(meta + 4) * num_columns", "tl.load(meta) * num_columns", "input"),
    "counters left as they are": ("== num_visits - 1", "== num_visits", "counters"),
}


@pytest.fixture(scope="module")
def kernels_text() -> str:
    return text_of("loraplex_kernels.lora.triton")


PLAN = plan_rows([(1, (Term(0, 0.5), Term(1, -1.5))), (2, ()), (17, (Term(2, 0.5),)), (1, (Term(1),))])
#: rows and columns around x and y that a wrong address may fall into
MARGIN = 2


def make_slots(generator: torch.Generator) -> dict[int, SlotDelta]:
    """Ranks that no tile divides, in every part other ones; scales and shifts."""
    slots = {}
    for slot, ranks in enumerate([(1, 13), (20, 5), (16, 35)]):
        parts = [
            PartDelta(
                random_factors(rank, IN, size, generator),
                random_scale(size, generator),
                torch.randn(size, generator=generator),
            )
            for rank, size in zip(ranks, PARTS, strict=True)
        ]
        slots[slot] = SlotDelta(tuple(parts), random_scale(IN, generator))
    return slots


def excess(check: str, kernels: Path) -> float:
    """How far one small product of a file's kernels is from the formula, as a multiple of what is allowed."""
    module = load_kernels(kernels)
    generator = torch.Generator().manual_seed(5)
    slots, recorder = make_slots(generator), Recorder()
    backend = make_lora(fused=check == "counters", forms=SMALL_FORMS, recorder=recorder, module=module)
    table = backend.new_table(IN, PARTS, dtype=torch.float32, device=CPU, max_bytes=BIG)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    plan = backend.prepare(PLAN)
    x = torch.randn(PLAN.num_rows + MARGIN, IN, generator=generator)[: PLAN.num_rows]
    whole = torch.randn(PLAN.num_rows + MARGIN, sum(PARTS), generator=generator)
    before, y = whole.clone()[: PLAN.num_rows], whole[: PLAN.num_rows]
    if check == "input":
        return worst_excess(table.scale_input(x, plan), expected_input(x, PLAN, slots), x.dtype)
    if check == "lookup":
        ids = torch.randint(1, IN, (PLAN.num_rows,), generator=generator)
        table.add_lookup_(y, ids, plan)
        x = torch.nn.functional.one_hot(ids, IN)
    else:
        table.add_(y, x, plan)
    if check == "counters":
        header = recorder.launches[-1].args[4]
        assert isinstance(header, torch.Tensor)
        return float(any((ctypes.c_int32 * 8).from_address(int(header[2])))) * 2
    return worst_excess(y, expected_output(before, x, PLAN, slots, PARTS), y.dtype)


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    made = Ward()
    yield made
    made.close()


@pytest.mark.parametrize("check", ["two launches", "lookup", "input", "counters"])
def test_the_kernels_as_they_are_pass(ward: Ward, check: str, kernels_text: str, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(kernels_text)
    assert ward.judge(excess, check, tmp_path / "triton.py") <= 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(ward: Ward, name: str, kernels_text: str, tmp_path: Path) -> None:
    before, after, check = MUTATIONS[name]
    assert before in kernels_text, "the mutation's text is no longer in the kernels"
    (tmp_path / "triton.py").write_text(kernels_text.replace(before, after))
    assert ward.judge(excess, check, tmp_path / "triton.py") > 1
