"""A merge through dense changes takes less memory than one dense matrix, beside its inputs and what comes of it, and
what is said beforehand, by which two sites are merged at once; the exact sum, and what it is compressed to, nearly
none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch

from bench.merging.large_site import NAME, large_site
from bench.merging.peak import heap_set_aside, peak_of
from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.merging.merge import merge
from loraplex.adapters.merging.room import dense_bytes, room_of
from loraplex.adapters.merging.sums import Input, sums_of
from loraplex.adapters.merging.team import Team
from loraplex.models.sites import Site
from loraplex.types import MergeOptions

#: those of the demo base's feed-forward part, and a square one: smaller matrices take more beside their size
SHAPES = [(1536, 576), (576, 1536), (1536, 1536)]
OPTIONS = {
    "ties_svd": MergeOptions("ties_svd", density=0.5),
    "ties_svd by frequency": MergeOptions("ties_svd", density=0.5, majority_sign_method="frequency"),
    "dare_linear_svd": MergeOptions("dare_linear_svd", density=0.5),
    "dare_ties_svd": MergeOptions("dare_ties_svd", density=0.5),
    "magnitude_prune_svd": MergeOptions("magnitude_prune_svd", density=0.5),
}


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    with heap_set_aside():
        yield


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """As the loader's thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_dense_merge_never_has_as_much_as_a_dense_matrix(shape: tuple[int, int], options: MergeOptions) -> None:
    base, inputs = large_site(shape)
    merge(inputs, options, base)  # what is imported and compiled once is no part of it
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    dense = shape[0] * shape[1] * torch.float32.itemsize
    square = min(shape) ** 2 * torch.float32.itemsize
    assert square / 2 < peak.total - merged.delta.nbytes < dense  # half a square of the shorter side has to be there


FACTORED = {
    "cat": MergeOptions("cat"),
    "cat of rank 16": MergeOptions("cat", svd_rank=16),
    "cat within an error": MergeOptions("cat", max_error=0.1),
    "svd": MergeOptions("svd"),
    "svd of rank 48": MergeOptions("svd", svd_rank=48),
}


@pytest.mark.parametrize("options", FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536)], ids=str)
def test_exact_sums_take_a_tenth_of_a_dense_matrix(
    shape: tuple[int, int], dtype: torch.dtype, options: MergeOptions
) -> None:
    """Of a small one; the factors of what is merged have 0.15 of its values."""
    base, inputs = large_site(shape, dtype)
    merge(inputs, options, base)
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    assert 0 < peak.total - merged.delta.nbytes < 0.1 * shape[0] * shape[1] * torch.float32.itemsize


def test_of_many_adapters_nothing_is_there_for_each_pair_of_components() -> None:
    """Whose ranks together are more than the matrix has: what there is has its shorter side."""
    base, inputs = large_site((192, 576))
    inputs = inputs * 16
    rank = sum(delta.max_rank for delta, _ in inputs)
    assert rank > 4 * 192
    for options in (MergeOptions("cat"), MergeOptions("svd")):
        merge(inputs, options, base)
        merged, peak = peak_of(lambda options=options: merge(inputs, options, base))
        assert peak.total - merged.delta.nbytes < 4 * rank * 192 * torch.float64.itemsize
    assert merged.delta.max_rank == 16


#: all ways that a site is merged through its dense change
DENSE = {
    **OPTIONS,
    "a higher rank": MergeOptions("dare_linear_svd", density=0.5, svd_rank=32),
    "ties_svd within an error": MergeOptions("ties_svd", density=0.5, max_error=0.5),
    "svd_clamp": MergeOptions("svd", svd_clamp=0.99),
}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("shape", [(1536, 576), (576, 576), (192, 576)], ids=str)
def test_a_merge_takes_what_is_said_beforehand(shape: tuple[int, int], options: MergeOptions) -> None:
    """No more than a twentieth above, which the two heights that are added account for; and not far less, or two that
    have room would be kept apart."""
    base, inputs = large_site(shape)
    site, num_inputs = merged_site(inputs, base)
    merge(inputs, options, base)
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    taken, said = peak.total - merged.delta.nbytes, room_of(site, num_inputs, 16, options)
    assert 0.3 * said < taken < 1.05 * said


#: ranks of inputs, how their singular values fall, and components that are kept (0: as many)
SPECTRA = {"flat": (64, 1.0, 16), "falling": (32, 0.7, 0), "falling fast": (16, 0.5, 0)}


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(1536, 576), (576, 576)], ids=str)
def test_so_does_one_of_other_ranks_and_values(shape: tuple[int, int], spectrum: str, method: str) -> None:
    """High ranks, of which single values are looked up; trained adapters' values, some of whose vectors are proven
    twice."""
    rank, fall, kept = SPECTRA[spectrum]
    options = MergeOptions(method, density=0.99, svd_rank=kept)
    base, inputs = large_site(shape)
    generator = torch.Generator().manual_seed(1)
    inputs = [(of_values(delta, fall ** torch.arange(rank), shape, generator), weight) for delta, weight in inputs[:2]]
    site, num_inputs = merged_site(inputs, base)
    merge(inputs, options, base)
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    taken, said = peak.total - merged.delta.nbytes, room_of(site, num_inputs, rank, options)
    assert 0.3 * said < taken < said


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("shape", [(1536, 576), (576, 576)], ids=str)
def test_what_iteration_in_float64_takes_is_claimed(shape: tuple[int, int], rank: int) -> None:
    """Where nothing is pruned, and values fall so far that float32 loses the last ones."""
    options = MergeOptions("dare_linear_svd", density=1.0)
    base, inputs = large_site(shape)
    generator = torch.Generator().manual_seed(0)
    values = 0.5 ** torch.arange(rank)
    inputs = [(of_values(delta, values, shape, generator), weight) for delta, weight in inputs[:2]]
    claimed: list[int] = []

    class Told(Team):
        def claim(self, num_bytes: int) -> None:
            claimed.append(num_bytes)

    merge(inputs, options, base, team=Told())
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    site, num_inputs = merged_site(inputs, base)
    said = room_of(site, num_inputs, rank, options, torch.float64)
    assert 0.3 * said < peak.total - merged.delta.nbytes < said
    assert claimed == [said if said <= dense_bytes(site) else 0]


def merged_site(inputs: Sequence[Input], base: BaseView) -> tuple[Site, int]:
    """The one that there is, and how many inputs have a change of it."""
    (found,) = sums_of(inputs, base, plain=False)
    return found.site, len(found.parts)


def of_values(
    delta: AdapterDelta, values: torch.Tensor, shape: tuple[int, int], generator: torch.Generator
) -> AdapterDelta:
    """Another LoRA of the same site, whose components have about these sizes ``[r]``."""
    out_features, in_features = shape
    a, b = (torch.randn(len(values), size, generator=generator) for size in (in_features, out_features))
    low_rank = LowRank((a * values.unsqueeze(1)).bfloat16(), b.T.bfloat16(), 2.0)
    return dataclasses.replace(delta, sites={NAME: SiteDelta(low_rank)})


def test_two_sites_of_the_largest_kind_have_room_together() -> None:
    """Of the demo base, and of a model of 8 billion parameters."""
    for shape in ((1536, 576), (14336, 4096)):
        base, inputs = large_site(shape)
        site, num_inputs = merged_site(inputs, base)
        for name, options in OPTIONS.items():
            assert 2 * room_of(site, num_inputs, 16, options) <= shape[0] * shape[1] * torch.float32.itemsize, name
