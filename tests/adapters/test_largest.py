"""Pruning keeps what PEFT's does, to the value, equal ones included."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import magnitude_based_pruning

from loraplex.adapters.merging.largest import largest
from loraplex.adapters.merging.matrix import whole
from loraplex_kernels.backend import MERGING
from loraplex_kernels.merging import Operand, Rule, Term

#: more than are looked through one by one, and more than one block of a matrix
COUNT = 200_000


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "random": random(),
    "a few": random()[:100],
    "a matrix": random().view(500, 400),
    "a transposed matrix": random().view(500, 400).T,
    "many equal ones": random().mul(8).round(),
    "two sizes": random().sign() * (1 + (torch.arange(COUNT) % 3 == 0)),
    "mostly zeros": random() * (torch.arange(COUNT) % 10 == 0),
    "zeros": torch.zeros(COUNT),
    "sorted": random().sort().values,
    "a wide matrix": random().view(40, 5000),
    # what a sample of every n-th value sees is not what there is
    "in step with the sample": torch.where(torch.arange(COUNT) % 3 == 0, 100.0, 1.0) * random(),
    "columns that differ": (10.0 ** -(torch.arange(400) % 12) * random().view(500, 400)),
    "from the smallest to the largest": random() * 10.0 ** torch.linspace(-44, 37, COUNT),
}


def kept_of(tensor: torch.Tensor, count: int, backend: str) -> torch.Tensor:
    merging = MERGING[backend].create()
    return whole(merging.combined([largest(Term(Operand(None, tensor)), count, merging)], Rule()))


@pytest.mark.parametrize("backend", MERGING)
@pytest.mark.parametrize("shape", [(1 << 10, 1 << 11), (1 << 14, 1 << 7)])
def test_equal_ones_of_a_large_matrix(shape: tuple[int, int], backend: str) -> None:
    """As many are kept as are to be, whichever they are."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(8).round()
    count = int(0.3 * tensor.numel())
    got = kept_of(tensor, count, backend)
    kept = got != 0
    assert int(kept.sum()) == count
    assert torch.equal(got[kept], tensor[kept])
    assert got[kept].abs().min() == tensor[~kept].abs().max()


@pytest.mark.parametrize("density", [1e-9, 1e-4, 0.2, 0.5, 0.93, 1 - 1e-9])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("backend", MERGING)
def test_the_largest(backend: str, name: str, density: float) -> None:
    tensor = torch.atleast_2d(TENSORS[name])
    before = tensor.clone()
    got = kept_of(tensor, int(density * tensor.numel()), backend)
    assert torch.equal(got, magnitude_based_pruning(tensor, density))
    assert torch.equal(tensor, before)
