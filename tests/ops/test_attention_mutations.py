"""The attention tests can fail: the kernels' source with one thing wrong at a time gives wrong answers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loraplex_kernels import attention as package
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import SUBJECTS, Geometry, Subject, World, dense, make_subject

SOURCE = Path(package.__path__[0], "triton.py")
Mutant = Callable[[str, str], ModuleType]

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


@pytest.fixture
def mutant(tmp_path: Path, request: pytest.FixtureRequest) -> Mutant:
    make_subject("triton, interpreted")  # skips where it cannot run

    def make(right: str, wrong: str) -> ModuleType:
        source = SOURCE.read_text()
        assert source.count(right) >= 1, f"{right!r} is not in the source"
        path = tmp_path / "mutated_triton.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("mutated_triton", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up
        request.addfinalizer(lambda: sys.modules.pop(spec.name, None))
        spec.loader.exec_module(module)
        return module

    return make


def worst(module: ModuleType) -> float:
    """The worst error of a few steps over pages that hold huge values wherever nothing was written."""
    world = World(
        Subject(module.TritonAttention(), torch.float32, SUBJECTS["triton, interpreted"]),
        Geometry(16, 1, 2, 4),
        torch.float32,
        window=290,
    )
    seq, other = world.add(311), world.add(24)
    for side in (*world.cache.keys, *world.cache.values):  # type: ignore[attr-defined]
        side.fill_(1e4)
    excess = 0.0
    for chunks in ([(seq, 260), (other, 5)], [(other, 1), (seq, 41)], [(seq, 1), (other, 1)], [(other, 1), (seq, 1)]):
        starts = [story.done for story, _ in chunks]
        for (story, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
            excess = max(excess, worst_excess(out, dense(story, start, start + count, world.window), torch.float32))
    return excess


def test_the_source_as_it_is_passes(mutant: Mutant) -> None:
    assert worst(mutant("", "")) <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(mutant: Mutant, mutation: str) -> None:
    assert worst(mutant(*MUTATIONS[mutation])) > 2
