"""A merge through dense changes takes less memory than one dense matrix, beside its inputs and what comes of it."""

from __future__ import annotations

import pytest
import torch

from bench.merging.large_site import large_site
from bench.merging.peak import peak_of
from loraplex.adapters.merging.merge import merge
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
