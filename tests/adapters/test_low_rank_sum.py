"""The exact sum and its components against the dense matrix in float64, whatever the factors are like."""

from __future__ import annotations

import pytest
import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.low_rank_sum import LowRankSum
from loraplex.adapters.merging.part import Part

SHAPES = [(48, 32), (32, 48), (40, 40)]


def part(shape: tuple[int, int], seed: int, rank: int = 4, *, weight: float = 1.0, size: float = 1.0) -> Part:
    """``size``: of A, by which B is divided."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return Part(LowRank(a * size, b / size, 2.0), weight)


def dense(parts: list[Part]) -> torch.Tensor:
    return sum(
        (part.coefficient * (part.low_rank.b.double() @ part.low_rank.a.double()) for part in parts),
        start=torch.zeros(len(parts[0].low_rank.b), parts[0].low_rank.a.shape[1], dtype=torch.float64),
    )


def value(low_rank: LowRank) -> torch.Tensor:
    return low_rank.b.double() @ low_rank.a.double()


def several(shape: tuple[int, int]) -> dict[str, list[Part]]:
    one, other = part(shape, 0), part(shape, 1)
    return {
        "two": [one, other],
        "of different ranks": [part(shape, 0, 1), part(shape, 1, 7)],
        "one twice": [one, other, one],
        "one with itself taken off": [one, other, part(shape, 0, weight=-1.0)],
        "of small B and large A": [part(shape, 0, size=1e6), part(shape, 1, size=1e-6), part(shape, 2)],
        "one far smaller": [one, part(shape, 1, weight=1e-4)],
        "of weight 0": [one, part(shape, 1, weight=0.0)],
        "of zeros": [one, Part(LowRank(torch.zeros(4, shape[1]), torch.zeros(shape[0], 4), 1.0), 1.0)],
        "of a B of zeros": [one, Part(LowRank(one.low_rank.a, torch.zeros(shape[0], 4), 1.0), 1.0)],
        "as many columns as rows": [part(shape, seed) for seed in range(8)],
        "more columns than rows": [part(shape, seed, 16) for seed in range(5)],
    }


CASES = [(shape, name) for shape in SHAPES for name in several(shape)]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_components_are_those_of_the_dense_matrix(shape: tuple[int, int], name: str) -> None:
    parts = several(shape)[name]
    exact, total = dense(parts), LowRankSum(parts)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    size = sum(float((abs(part.coefficient) * value(part.low_rank)).norm()) for part in parts)
    found = total.truncation(torch.float32)
    torch.testing.assert_close(found.values, s[: len(found.values)], rtol=0, atol=1e-7 * size)
    assert float(s[len(found.values) :].norm()) < 1e-7 * size
    assert found.rest == 0
    for rank in (1, 4, len(found.values)):
        best, kept = (u[:, :rank] * s[:rank]) @ vh[:rank], found.low_rank(rank)
        assert kept.rank == rank
        assert float((value(kept) - best).norm()) < 1e-6 * size
        true = float((value(kept) - exact).norm() / exact.norm())
        assert found.distance(kept) == pytest.approx(true, rel=1e-3, abs=1e-6)
        assert total.distance(kept) == pytest.approx(true, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_is_rounded_once(dtype: torch.dtype) -> None:
    parts = [part((48, 32), seed, 3, weight=0.3 + seed) for seed in range(3)]
    whole = LowRankSum(parts).whole(dtype)
    assert whole.scale == 1
    assert torch.equal(whole.a, torch.cat([part.low_rank.a for part in parts]).to(dtype))
    assert torch.equal(whole.b, torch.cat([part.low_rank.b * part.coefficient for part in parts], 1).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_have_equal_shares_of_what_they_are(shape: tuple[int, int]) -> None:
    """So that narrow dtypes hold what is far from 1."""
    parts = [part(shape, seed, weight=1e6) for seed in range(2)]
    kept = LowRankSum(parts).truncation(torch.float16).low_rank(6)
    assert kept.a.dtype == kept.b.dtype == torch.float16
    torch.testing.assert_close(kept.a.float().norm(dim=1), kept.b.float().norm(dim=0), rtol=1e-2, atol=0)
    assert kept.a.is_contiguous()
    assert kept.b.is_contiguous()


@pytest.mark.parametrize("weight", [1e38, 1e300, float("inf")])
@pytest.mark.parametrize("rank", [4, 40])
def test_what_leaves_the_range_of_float32_is_refused(weight: float, rank: int) -> None:
    total = LowRankSum([part((48, 32), 0, rank, weight=weight), part((48, 32), 1)])
    with pytest.raises(OverflowError, match="out of the range of float32"):
        total.truncation(torch.float32)


def test_nothing_at_all_is_no_distance() -> None:
    nothing = Part(LowRank(torch.zeros(2, 8), torch.zeros(8, 2), 1.0), 1.0)
    found = LowRankSum([nothing]).truncation(torch.float32)
    assert not found.values.any()
    assert found.distance(found.low_rank(2)) == 0
    assert not value(found.low_rank(2)).any()
