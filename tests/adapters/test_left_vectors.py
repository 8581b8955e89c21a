"""The leading singular vectors are the true ones however close values are; where that is not proven, all are found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from loraplex.adapters.merging import left_vectors as module
from loraplex.adapters.merging.dense_sum import decompose
from loraplex.adapters.merging.gram import Gram
from loraplex.adapters.merging.left_vectors import LeftVectors, left_vectors
from loraplex.adapters.merging.matrix import Matrix
from loraplex_kernels.backend import choose_merging
from loraplex_kernels.merging import Operand, Rule, Term

BACKEND = choose_merging("auto")
ROWS, COLUMNS, COUNT = 240, 300, 8
#: of what is kept, relative to the whole; a float32 decomposition comes no nearer
TOLERANCE = 3e-6


def rotated(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, ROWS, generator=generator, dtype=torch.float64)).Q for size in (ROWS, COLUMNS)
    )
    return ((left * values) @ right.T).float()


def diagonal(values: torch.Tensor) -> torch.Tensor:
    """The same, with values that are exactly these; the largest are not the first."""
    matrix = torch.zeros(ROWS, COLUMNS)
    matrix.diagonal().copy_(values.flip(0).float())
    return matrix


def falling(rate: float) -> torch.Tensor:
    return rate ** torch.arange(ROWS, dtype=torch.float64)


def with_neighbours(gap: float) -> torch.Tensor:
    """The last of the first ``COUNT`` and the next one differ by no more than this part."""
    values = falling(0.97)
    values[COUNT] = values[COUNT - 1] * (1 - gap)
    return values


def noise() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def of_rank(rank: int) -> torch.Tensor:
    values = torch.zeros(ROWS, dtype=torch.float64)
    values[:rank] = falling(0.8)[:rank]
    return rotated(values)


def held(matrix: torch.Tensor) -> Matrix:
    return BACKEND.combined([Term(Operand(None, matrix))], Rule())


def leading(matrix: torch.Tensor) -> LeftVectors:
    return left_vectors(held(matrix), COUNT, BACKEND)


#: name -> matrix, whether its leading vectors come without all others
CASES: dict[str, tuple[Callable[[], torch.Tensor], bool | None]] = {
    "falling slowly": (lambda: rotated(falling(0.97)), True),
    "falling by half": (lambda: rotated(falling(0.5)), True),
    "falling fast": (lambda: rotated(falling(0.3)), True),
    "falling beyond squares in float64": (lambda: diagonal(falling(0.01)), True),
    "signal in noise": (lambda: 2 * of_rank(20) + 1e-3 * noise(), True),
    "neighbours 1e-3 apart": (lambda: rotated(with_neighbours(1e-3)), True),
    "neighbours 1e-5 apart": (lambda: rotated(with_neighbours(1e-5)), True),
    "neighbours one rounding apart": (lambda: diagonal(with_neighbours(6e-8)), None),
    "a cluster around the last one": (
        lambda: rotated(torch.cat((falling(0.9)[:6], 0.3 + falling(0.99)[6:] * 1e-4))),
        None,
    ),
    "noise alone": (noise, None),
    "all values equal": (lambda: diagonal(torch.ones(ROWS)), False),
    "of exactly the rank": (lambda: of_rank(COUNT), True),
    "of a lower rank": (lambda: of_rank(3), None),
    "one value": (lambda: of_rank(1), None),
    "zero": (lambda: torch.zeros(ROWS, COLUMNS), False),
    "squares below float32": (lambda: 1e-22 * rotated(falling(0.97)), True),
    "squares above float32": (lambda: 1e22 * rotated(falling(0.97)), True),
}


def off(matrix: torch.Tensor, u: torch.Tensor, count: int) -> tuple[float, float]:
    """How far ``U U^T D`` is from what a float64 decomposition keeps, relative to D; and how much more of D's squares
    it leaves out."""
    exact = matrix.double()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    best, got = (left[:, :count] * values[:count]) @ right[:count], u[:, :count] @ (u[:, :count].T @ exact)
    size = float(exact.norm()) or 1.0
    left_out = [float((exact - kept).square().sum()) for kept in (got, best)]
    return float((got - best).norm()) / size, (left_out[0] - left_out[1]) / size**2


@pytest.mark.parametrize(("make", "is_fast"), CASES.values(), ids=CASES)
def test_leading_vectors(make: Callable[[], torch.Tensor], is_fast: bool | None) -> None:
    matrix = make()
    found = leading(matrix)
    values, u = found.values, found.vectors
    assert is_fast is None or (len(values) == COUNT) is is_fast
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(values[:COUNT], exact[:COUNT], rtol=0, atol=TOLERANCE * float(exact.norm()))
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), rtol=0, atol=1e-10)
    kept = (u[:, :COUNT].T @ matrix.double()).float()
    torch.testing.assert_close(found.coordinates(COUNT), kept, rtol=0, atol=TOLERANCE * float(exact.norm()))
    moved, lost = off(matrix, u, COUNT)
    assert abs(lost) < TOLERANCE**2
    if exact[COUNT - 1] > exact[COUNT]:  # else which one is kept is free
        assert moved < TOLERANCE


def tilted(by: float) -> torch.Tensor:
    """A block that holds the leading vectors of a diagonal matrix, but for an angle."""
    width = 20
    block = torch.zeros(ROWS, width)
    block[-width:] = torch.eye(width).flip(0)
    block[:-width] = by * torch.randn(ROWS - width, width, generator=torch.Generator().manual_seed(2))
    return torch.linalg.qr(block).Q


@pytest.mark.parametrize(
    ("block", "is_believed"),
    [
        (tilted(0.0), True),
        (tilted(1e-4), False),
        (torch.linalg.qr(noise()[:, :20]).Q, False),
    ],
    ids=["true", "tilted", "at random"],
)
def test_what_iteration_finds_is_believed_only_where_it_is_true(
    block: torch.Tensor, is_believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_filtered", lambda *_: block)
    matrix = diagonal(falling(0.97))
    found = leading(matrix)
    assert (len(found.values) == COUNT) is is_believed
    assert off(matrix, found.vectors, COUNT)[0] < TOLERANCE


@pytest.mark.parametrize(("proofs", "is_believed"), [(1, False), (module._PROOFS, True)])
def test_what_is_nearly_true_becomes_so_by_the_proofs_own_products(
    proofs: int, is_believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROOFS", proofs)
    monkeypatch.setattr(module, "_filtered", lambda *_: tilted(1e-6))
    matrix = diagonal(falling(0.8))
    found = leading(matrix)
    assert (len(found.values) == COUNT) is is_believed
    assert off(matrix, found.vectors, COUNT)[0] < TOLERANCE


def test_an_angle_that_is_harmless_by_itself_swaps_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leaning towards what is outside the block counts the more, the nearer values within it are."""
    monkeypatch.setattr(module, "_PROOFS", 1)
    for gap, is_believed in ((1e-1, True), (6e-8, False)):
        monkeypatch.setattr(module, "_filtered", lambda *_: tilted(1e-7))
        matrix = diagonal(with_neighbours(gap))
        found = leading(matrix)
        assert (len(found.values) == COUNT) is is_believed, gap
        assert off(matrix, found.vectors, COUNT)[0] < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 8, 97])
def test_the_lower_half_multiplies_as_the_whole(size: int, dtype: torch.dtype) -> None:
    wide = torch.randn(size, 120, generator=torch.Generator().manual_seed(0))
    gram, exact = Gram.of(held(wide), dtype, BACKEND), (wide.double() @ wide.double().T).to(dtype)
    near = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    for width in (7, 16):
        block = torch.randn(size, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
        torch.testing.assert_close(gram @ block, exact @ block, **near)
    torch.testing.assert_close(gram.whole(), exact, **near)
    assert gram.size == size
    assert gram.norm == pytest.approx(float(wide.norm()))
    assert sum(rows.numel() for rows in gram.lower.values()) <= size**2 * 5 / 8 + size * 2


@pytest.mark.parametrize("size", [3, 97])
def test_what_is_taken_out_is_in_no_product(size: int) -> None:
    wide = torch.randn(size, 120, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    gram, exact = Gram.of(held(wide), torch.float64, BACKEND), wide.double() @ wide.double().T
    squares, vectors = torch.linalg.eigh(exact)
    gram.take_out(vectors[:, 1:], squares[1:].numpy())
    torch.testing.assert_close(gram.whole(), squares[0] * torch.outer(vectors[:, 0], vectors[:, 0]))


def filterings(matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a block is filtered until the leading vectors, which are the true ones, are found."""
    number, enlarged = 0, Gram.enlarged

    def counted(*args: Any) -> torch.Tensor:
        nonlocal number
        number += 1
        return enlarged(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Gram, "enlarged", counted)
        found = leading(matrix)
    assert len(found.values) == COUNT
    assert off(matrix, found.vectors, COUNT)[0] < TOLERANCE
    return number


def test_vectors_that_are_found_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first values are far larger than the last wanted ones, filters are of higher degrees so."""
    matrix = rotated(torch.cat((60 * falling(0.6)[:4], falling(0.98)[4:])))
    with_all = filterings(matrix, monkeypatch)
    monkeypatch.setattr(module, "_ready", lambda *_: 0)
    assert with_all < filterings(matrix, monkeypatch)


@pytest.mark.parametrize("is_tall", [False, True])
def test_both_sides(is_tall: bool) -> None:
    matrix = of_rank(20) + 1e-3 * noise()
    dense = matrix.T.contiguous() if is_tall else matrix
    found = decompose(held(dense), COUNT, torch.float32, partial(left_vectors, backend=BACKEND))
    assert len(found.values) == COUNT
    kept = found.low_rank(COUNT)
    u, values, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    best = (u[:, :COUNT] * values[:COUNT]) @ vh[:COUNT]
    assert float((kept.b.double() @ kept.a.double() - best).norm() / values.norm()) < TOLERANCE
