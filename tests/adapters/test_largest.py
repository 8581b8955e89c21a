"""Pruning keeps what PEFT's does, to the value, equal ones included."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import magnitude_based_pruning

from loraplex.adapters.merging.largest import largest

#: more than are looked through one by one
COUNT = 100_000


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "random": random(),
    "a few": random()[:100],
    "a matrix": random().view(250, 400),
    "a transposed matrix": random().view(250, 400).T,
    "many equal ones": random().mul(8).round(),
    "two sizes": random().sign() * (1 + (torch.arange(COUNT) % 3 == 0)),
    "mostly zeros": random() * (torch.arange(COUNT) % 10 == 0),
    "zeros": torch.zeros(COUNT),
    "sorted": random().sort().values,
    # what a sample of every n-th value sees is not what there is
    "in step with the sample": torch.where(torch.arange(COUNT) % 3 == 0, 100.0, 1.0) * random(),
    "from the smallest to the largest": random() * 10.0 ** torch.linspace(-44, 37, COUNT),
}


@pytest.mark.parametrize("density", [1e-9, 1e-4, 0.2, 0.5, 0.93, 1 - 1e-9])
@pytest.mark.parametrize("name", TENSORS)
def test_the_largest(name: str, density: float) -> None:
    tensor = TENSORS[name]
    before = tensor.clone()
    got = largest(tensor, int(density * tensor.numel()), torch.empty(tensor.shape))
    assert torch.equal(got, magnitude_based_pruning(tensor, density))
    assert torch.equal(tensor, before)
