"""The attention tests can fail: the kernels' source with one thing wrong at a time gives wrong answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_kernels import attention as package
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import SUBJECTS, Geometry, Subject, World, dense, make_subject
from tests.ops.lora_device import load_kernels
from tests.ops.mutants import FATAL, Ward

SOURCE = Path(package.__path__[0], "triton.py")

MUTATIONS = {
    "a key too many of the chunk": ("at[None, :] <= position[:, None])", "at[None, :] <= position[:, None] + 1)"),
    "a key too few of the chunk": ("at[None, :] <= position[:, None])", "at[None, :] < position[:, None])"),
    "the window is one too wide": ("> position[:, None] - window)", "> position[:, None] - window - 1)"),
    "a decode's window is one too narrow": ("before + 1 - window, 0)", "before + 2 - window, 0)"),
    "the scale is dropped": ('input_precision="ieee") * scale', 'input_precision="ieee")'),
    "a decode's own key is not scaled": ("[None, :], 1) * scale", "[None, :], 1)"),
    "the last page is left out": ("end = tl.minimum(high, (split", "end = tl.minimum(high // PAGE * PAGE, (split"),
    "the first split is not joined": ("there = (split >= first)", "there = (split > first)"),
    "a split counts for too little": ("weights[:, None] * tl.load", "0.9 * weights[:, None] * tl.load"),
    "sums are not shrunk": ("total = total * shrink +", "total = total +"),
    "products are not shrunk": ("acc * shrink[:, None]", "acc"),
    "one head's splits are joined for all": ("head = work % HEADS", "head = work % HEADS * 0"),
    "a decode's value is not written": ("tl.store(values + target + dims", "tl.store(values + target + dims + 1"),
    "a chunk's key is written a slot off": ("slot % PAGE * stride_slot)", "(slot + 1) % PAGE * stride_slot)"),
    "slots past the context are read": ("there = (at >= begin) & (at < end)", "there = at >= begin"),
}


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    make_subject("triton, interpreted")  # skips where it cannot run
    made = Ward()
    yield made
    made.close()


def worst(kernels: Path) -> float:
    """The worst error of a file's kernels in a few steps over pages that hold huge values where nothing was written."""
    module = load_kernels(kernels)
    world = World(
        Subject(module.TritonAttention(), torch.float32, SUBJECTS["triton, interpreted"]),
        Geometry(16, 1, 2, 4),
        torch.float32,
        window=290,
    )
    seq, other = world.add(311), world.add(24)
    for side in (*world.cache.keys, *world.cache.values):  # type: ignore[attr-defined]
        side.fill_(1e4)
    world.fill(seq, 260)
    excess = 0.0
    for chunks in ([(other, 5)], [(other, 1), (seq, 41)], [(seq, 1), (other, 1)], [(other, 1), (seq, 1)]):
        starts = [story.done for story, _ in chunks]
        for (story, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
            excess = max(excess, worst_excess(out, dense(story, start, start + count, world.window), torch.float32))
    return excess


def test_the_source_as_it_is_passes(ward: Ward) -> None:
    assert ward.judge(worst, SOURCE) <= 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(ward: Ward, mutation: str, tmp_path: Path) -> None:
    right, wrong = MUTATIONS[mutation]
    source = SOURCE.read_text()
    assert right in source, "the mutation's text is no longer in the kernels"
    (tmp_path / "triton.py").write_text(source.replace(right, wrong))
    assert ward.judge(worst, tmp_path / "triton.py") > 2


def test_a_mutant_that_takes_its_process_with_it_is_seen(ward: Ward) -> None:
    assert ward.judge(os._exit, 3) == FATAL  # type: ignore[arg-type]
    assert ward.judge(float, 0.5) == 0.5
