"""The contract of the gated norm behind a scan, for every backend that runs here, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_kernels.ssd import GateNorm, SsdBackend
from loraplex_kernels.testing import worst_excess
from tests.ops.ssd_layers import expected_gate, gated
from tests.ops.state_subjects import DTYPES, SSD_SUBJECTS, Subject, matrix, same_bits

EPS = 1e-5


def drawn(rows: int, width: int, dtype: torch.dtype, weight: str) -> tuple[torch.Tensor, torch.Tensor, GateNorm]:
    """y, z, and a norm of one group."""
    generator = torch.Generator().manual_seed(rows * width)
    y, z, own = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    chosen = {"none": None, "shared": torch.randn(width, generator=generator).to(dtype), "own": own}[weight]
    return y, z, GateNorm(chosen, 1, EPS)


@pytest.mark.parametrize(
    ("ssd", "dtype", "shape", "weight", "first"),
    matrix(
        SSD_SUBJECTS,
        ((1, 64, 1), (5, 48, 2), (33, 21, 3), (2, 1536, 1), (7, 24, 8), (3, 4099, 1)),
        ("none", "shared", "own"),
        (False, True),
    ),
    indirect=["ssd"],
)
def test_gates_match_the_formula(
    ssd: Subject[SsdBackend], dtype: torch.dtype, shape: tuple[int, int, int], weight: str, first: bool
) -> None:
    rows, width, groups = shape
    y, z, norm = drawn(rows, width, dtype, weight)
    norm = replace(norm, groups=groups, norm_before_gate=first)
    assert worst_excess(gated(ssd, y, z, norm), expected_gate(y, z, norm), dtype) <= 1


def test_a_weight_may_be_float32(ssd: Subject[SsdBackend]) -> None:
    y, z, norm = drawn(3, 48, ssd.dtype, "shared")
    assert norm.weight is not None
    norm = replace(norm, weight=norm.weight.float() * 1.001)
    assert worst_excess(gated(ssd, y, z, norm), expected_gate(y, z, norm), ssd.dtype) <= 1


def test_rows_of_nearly_nothing(ssd: Subject[SsdBackend]) -> None:
    """The norm's eps decides; zeros stay zeros."""
    y, z, norm = drawn(4, 32, torch.float32, "shared")
    y *= torch.tensor([1e-3, 1e-6, 0.0, 1e3])[:, None]
    out = gated(ssd, y, z, norm)
    wanted = expected_gate(y, z, norm)
    for row in range(4):
        assert worst_excess(out[row], wanted[row], torch.float32) <= 1
    assert (out[2] == 0).all()


@pytest.mark.parametrize("side", ["y", "z", "weight"])
@pytest.mark.parametrize("first", [False, True])
def test_poison_stays_in_its_row(ssd: Subject[SsdBackend], side: str, first: bool) -> None:
    """And in its group, where what is poisoned is normed."""
    y, z, norm = drawn(6, 24, ssd.dtype, "own")
    norm = replace(norm, groups=2, norm_before_gate=first)
    clean = gated(ssd, y, z, norm)
    assert norm.weight is not None
    {"y": y, "z": z, "weight": norm.weight}[side][3, 17] = float("nan")
    out = gated(ssd, y, z, norm)
    spoiled = torch.zeros(6, 24, dtype=torch.bool)
    spoiled[3, 17] = True
    if side == "y" or (side == "z" and not first):
        spoiled[3, 12:] = True
    assert torch.equal(out.isnan(), spoiled)
    assert same_bits(out[~spoiled], clean[~spoiled])


def test_rows_alone_are_as_beside_others(ssd: Subject[SsdBackend]) -> None:
    y, z, norm = drawn(40, 96, ssd.dtype, "own")
    together = gated(ssd, y, z, norm)
    assert norm.weight is not None
    for row in (0, 7, 39):
        one = slice(row, row + 1)
        alone = gated(ssd, y[one], z[one], replace(norm, weight=norm.weight[one]))
        assert worst_excess(together[one], alone, ssd.dtype) <= 1
        if ssd.entry.same_alone:
            assert same_bits(together[one], alone)


def test_no_rows(ssd: Subject[SsdBackend]) -> None:
    y, z, norm = drawn(0, 24, ssd.dtype, "shared")
    assert gated(ssd, y, z, norm).shape == (0, 24)


def test_what_does_not_fit_is_refused(ssd: Subject[SsdBackend]) -> None:
    y, z, norm = drawn(3, 24, ssd.dtype, "shared")
    y, z = y.to(ssd.device), z.to(ssd.device)
    other = torch.float32 if ssd.dtype is not torch.float32 else torch.float16
    weight = torch.ones(24, dtype=ssd.dtype, device=ssd.device)
    norm = replace(norm, weight=weight)
    for wrong_y, wrong_z, wrong, message in (
        (y, z[:2], norm, "z is "),
        (y, z.to(other), norm, "z is "),
        (y, z, replace(norm, groups=5), "multiple of 5 groups"),
        (y, z, replace(norm, weight=weight[1:]), "weight is "),
        (y, z, replace(norm, weight=weight.expand(2, -1).contiguous()), "weight is "),
    ):
        with pytest.raises(ValueError, match=message):
            ssd.backend.gate(wrong_y, wrong_z, wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype) -> None:
    """Norm and gate exchanged, one group for two, and a weight dropped, each made once: all are far outside what is
    allowed."""
    y, z, norm = drawn(5, 48, dtype, "shared")
    norm = replace(norm, groups=2)
    right = expected_gate(y, z, norm)
    assert norm.weight is not None
    for wrong in (
        replace(norm, norm_before_gate=True),
        replace(norm, groups=1),
        replace(norm, weight=torch.ones_like(norm.weight)),
        replace(norm, eps=0.1),
    ):
        assert worst_excess(expected_gate(y, z, wrong).to(dtype), right, dtype) > 2
