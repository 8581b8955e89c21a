"""The contract of merged matrices, for every backend that runs here, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from loraplex_kernels.backend import MERGING, choose_merging
from loraplex_kernels.merging import (
    BITS_PADDING,
    Election,
    MergingBackend,
    Operand,
    Piece,
    Place,
    Rule,
    Term,
    packed,
)
from loraplex_kernels.merging.cpu import CpuMerging

#: of the last one the code is for vectors half as long
BACKENDS = {**{name: entry.create() for name, entry in MERGING.items()}, "cpu, older": CpuMerging(processor="haswell")}
#: tiles and vectors that are whole, and all kinds of rests
SHAPES = [(1, 1), (3, 16), (4, 64), (9, 47), (37, 150)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = (5, 1, 8, 3)
NOT_FINITE = [math.inf, -math.inf, math.nan]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> MergingBackend:
    return BACKENDS[request.param]


def integers(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Small ones, of which all sums and products are exact."""
    return torch.randint(-3, 4, tuple(shape), generator=torch.Generator().manual_seed(seed)).float()


def terms_of(shape: tuple[int, int], dtype: torch.dtype, *, products: bool, pruning: str, count: int = 4) -> list[Term]:
    rows, columns = shape
    terms = []
    for place, rank in zip(range(count), RANKS, strict=False):
        right = integers((rank if products else rows, columns), place)
        left = integers((rows, rank), 10 + place).to(dtype) if products else None
        terms.append(Term(Operand(left, right.to(dtype), (2.0, 0.5, 3.0, 1.0)[place]), (0.5, -2.0, 1.25, 3.0)[place]))
        if pruning == "bound" or (pruning == "both" and place % 2):
            terms[-1] = replace(terms[-1], bound=float(place + 1))
        if pruning == "bits" or (pruning == "both" and not place % 2):
            drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(20 + place)) < 0.6
            terms[-1] = replace(terms[-1], bits=packed(drawn.numpy()))
    return terms


def values_of(term: Term) -> torch.Tensor:
    operand, right = term.operand, term.operand.right.double()
    values = operand.scale * (right if operand.left is None else operand.left.double() @ right)
    values = torch.where(values.abs() <= term.bound, 0.0, values)
    if term.bits is None:
        return values
    kept = np.unpackbits(term.bits, bitorder="little", count=values.numel()).reshape(values.shape)
    return values * torch.from_numpy(kept)


def expected(terms: Sequence[Term], rule: Rule) -> torch.Tensor:
    values = torch.stack([values_of(term) / rule.share for term in terms])
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64).view(-1, 1, 1)
    if rule.election is Election.NONE:
        return (weights * values).sum(0)
    votes = (values if rule.election is Election.BY_SIZE else values.sign()).sum(0)
    sign = torch.where(votes < 0, -1.0, 1.0).double()
    ours = (values * sign).clamp_min(0)
    return sign * (weights * ours).sum(0) / (ours > 0).sum(0).clamp_min(1)


def everything(shape: tuple[int, int]) -> Place:
    return slice(0, shape[0]), slice(0, shape[1])


def found(backend: MergingBackend, terms: Sequence[Term], rule: Rule, at: Place | None = None) -> torch.Tensor:
    combined = backend.combined(terms, rule)
    assert combined.shape == terms[0].operand.shape
    rows, columns = at = at or everything(combined.shape)
    out = torch.full((rows.stop - rows.start, columns.stop - columns.start), math.nan)
    combined.fill(at, out)
    return out


@pytest.mark.parametrize("election", Election)
@pytest.mark.parametrize("pruning", ["none", "bound", "bits", "both"])
@pytest.mark.parametrize("products", [True, False], ids=["products", "held"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formula(
    backend: MergingBackend, dtype: torch.dtype, products: bool, pruning: str, election: Election
) -> None:
    for shape in SHAPES:
        for count in (1, 4):
            terms = terms_of(shape, dtype, products=products, pruning=pruning, count=count)
            for share in (1.0, 0.5):  # with others ties of the election would hang on rounding
                rule = Rule(election, share)
                torch.testing.assert_close(
                    found(backend, terms, rule), expected(terms, rule).float(), rtol=1e-6, atol=1e-6
                )


def test_a_share_divides(backend: MergingBackend) -> None:
    """To the bit: a product with its inverse is another number."""
    right = torch.randn(9, 47)
    assert torch.equal(found(backend, [Term(Operand(None, right))], Rule(share=0.3)), right / 0.3)


@pytest.mark.parametrize("transposed", [True, False])
def test_factors_whose_rows_lie_apart(backend: MergingBackend, transposed: bool) -> None:
    """As an embedding's do, and as slices of larger ones."""
    wide = [Operand(integers((50, 9), 1)[:, 2:7], integers((5, 99), 2)[:, 3:60]) for _ in range(2)]
    terms = [Term(each.transpose if transposed else each, 0.5) for each in wide]
    assert torch.equal(found(backend, terms, Rule()), expected(terms, Rule()).float())


@pytest.mark.parametrize("pruning", ["none", "bound", "bits"])
def test_a_value_is_the_same_in_every_block(pruning: str) -> None:
    """Of kernels, in which what was found to be among the largest still is, wherever it is looked at."""
    shape = (41, 93)
    for name in ("cpu", "cpu, older"):
        terms = []
        for term in terms_of(shape, torch.float32, products=True, pruning=pruning):
            left, right = term.operand.left, term.operand.right
            assert left is not None
            terms.append(replace(term, operand=Operand(torch.randn(left.shape), torch.randn(right.shape), 0.7)))
        for election in Election:
            whole = found(BACKENDS[name], terms, Rule(election, 0.3))
            for at in ((slice(0, 41), slice(17, 18)), (slice(40, 41), slice(0, 93)), (slice(3, 30), slice(5, 90))):
                assert torch.equal(found(BACKENDS[name], terms, Rule(election, 0.3), at), whole[at])


def test_nothing_beside_a_block_is_written(backend: MergingBackend) -> None:
    terms = terms_of((9, 47), torch.float32, products=True, pruning="none")
    combined = backend.combined(terms, Rule())
    room = torch.full((5 * 21 + 128,), 7.0)
    combined.fill((slice(2, 7), slice(11, 32)), room[64:-64].view(5, 21))
    assert bool((room[:64] == 7).all())
    assert bool((room[-64:] == 7).all())
    assert torch.equal(room[64:-64].view(5, 21), expected(terms, Rule()).float()[2:7, 11:32])


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("election", Election)
@pytest.mark.parametrize("pruning", ["none", "bound"])
def test_what_is_not_finite_comes_out(backend: MergingBackend, pruning: str, election: Election, value: float) -> None:
    terms = terms_of((9, 47), torch.float32, products=False, pruning=pruning, count=3)
    terms[1].operand.right[4, 40] = value
    for term in (terms[0], terms[2]):
        term.operand.right[4, 40] = math.copysign(1.0, value)  # the majority's sign is that of the value
    out = found(backend, terms, Rule(election))
    assert not out[4, 40].isfinite()
    out[4, 40] = 0
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_draws_are_those_of_torch(backend: MergingBackend, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = backend.draws(seed)
    for count in (16, 1, 7, 640, 623, 5000, 3, 100_000):
        for share in (0.3, 1e-8, 1 - 1e-8):
            drawn = torch.rand(count, generator=generator) < torch.tensor(share)
            assert np.array_equal(draws.bits(count, share), packed(drawn.numpy()))


@pytest.mark.parametrize(
    "counts", [(5, 624, 1000, 624 * 3 - 5), (624,), (623, 1, 1), (100,) * 20, (624 * 16, 8)], ids=str
)
def test_draws_that_are_left_for_later(backend: MergingBackend, counts: tuple[int, ...]) -> None:
    draws, plain = backend.draws(3), backend.draws(3)
    later = [draws.later(count) for count in counts]
    wanted = [plain.bits(count, 0.4) for count in counts]
    for place in reversed(range(len(counts))):  # in any order
        assert np.array_equal(later[place].bits(counts[place], 0.4), wanted[place])
    assert np.array_equal(draws.bits(77, 0.4), plain.bits(77, 0.4))


def test_a_share_between_two_numbers(backend: MergingBackend) -> None:
    """Numbers are multiples of 2^-24; below 2.5 of these is also the one that is 2, which seed 0 draws here."""
    draws, place = backend.draws(0), (1 << 22) + 108031
    draws.later(place)
    assert draws.bits(1, 2.5 / 2**24)[0] == 1
    draws = backend.draws(0)
    draws.later(place)
    assert draws.bits(1, 2.0 / 2**24)[0] == 0


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1), (1, 15), (16, 1), (1, 17), (4, 64), (10, 100), (17, 241)], ids=str
)
def test_gathered(backend: MergingBackend, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[1:9:3] = 0.5
    values.view(-1)[5:8] = math.nan
    sizes = values.abs()
    for low, high in ((0.5, 0.5), (0.2, 1.0), (-1.0, math.inf), (2.0, 1.0)):
        below, between = backend.gathered(Operand(None, values), low, high)
        assert below == int((~(sizes >= low)).sum())
        assert torch.equal(between.sort().values, sizes[(sizes >= low) & (sizes <= high)].sort().values)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_of_a_product(backend: MergingBackend, dtype: torch.dtype, *, transposed: bool) -> None:
    """The values that are combined, to the bit: bounds that are two of them hold both."""
    operand = Operand(torch.randn(37, 5).to(dtype), torch.randn(5, 150).to(dtype), -0.7)
    operand = operand.transpose if transposed else operand
    sizes = found(backend, [Term(operand)], Rule()).abs().view(-1).sort().values
    below, between = backend.gathered(operand, float(sizes[1000]), float(sizes[1100]))
    assert below == 1000
    assert torch.equal(between.sort().values, sizes[1000:1101])


def pieces_of(matrix: torch.Tensor, cuts: Sequence[tuple[slice, slice]], *, transposed: bool) -> list[Piece]:
    """Some of a matrix, with gaps, each in memory of its own, laid out by rows or by columns."""
    made = []
    for rows, columns in cuts:
        values = matrix[rows, columns]
        values = values.T.contiguous().T if transposed else values.contiguous()
        made.append(Piece(values, rows.start, columns.start))
    return made


#: rows that are whole tiles and not; columns that are one stretch, and more with a rest
CUTS = {
    "one": [(slice(0, 50), slice(0, 230))],
    "a corner": [(slice(7, 13), slice(3, 4))],
    "several": [(slice(0, 24), slice(0, 96)), (slice(24, 50), slice(0, 200)), (slice(3, 9), slice(200, 230))],
    "over each other": [(slice(0, 30), slice(10, 110)), (slice(20, 50), slice(100, 110))],
}


@pytest.mark.parametrize("width", [16, 48, 7])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_of_pieces(
    backend: MergingBackend, dtype: torch.dtype, cuts: list[tuple[slice, slice]], *, transposed: bool, width: int
) -> None:
    matrix = integers((50, 230), 1).to(dtype)
    made = pieces_of(matrix, cuts, transposed=transposed)
    whole = torch.zeros_like(matrix)
    for piece in made:
        rows, columns = piece.values.shape
        whole[piece.row : piece.row + rows, piece.column : piece.column + columns] += piece.values
    block, to = integers((230, width), 2).to(dtype), integers((50, width), 3).to(dtype)
    product = whole @ block
    multiply = backend.pieces(made).add_product
    got = multiply(block, to.clone(), share=-1, factor=0.5)
    assert torch.equal(got, 0.5 * product - to)
    assert torch.equal(multiply(block, torch.full_like(to, math.nan), share=0), product)  # as memory may be


@pytest.mark.parametrize("width", [32, 5])
def test_products_of_pieces_beside_the_block_itself(backend: MergingBackend, width: int) -> None:
    """As the recurrences of polynomials have it; what is written to the pieces later counts."""
    matrix, block, to = integers((50, 50), 1), integers((50, width), 2), integers((50, width), 3)
    values = torch.zeros(50, 50)
    pieces = backend.pieces([Piece(values)])
    values.copy_(matrix)
    got = pieces.add_product(block, to.clone(), share=-1, of=-2, factor=4)
    assert torch.equal(got, 4 * (matrix @ block) - 2 * block - to)


def test_what_a_kernel_must_not_be_given() -> None:
    backend = CpuMerging()
    product, held = Operand(torch.ones(4, 2), torch.ones(2, 6)), Operand(None, torch.ones(4, 6))
    combined = backend.combined([Term(product)], Rule())
    for at, out in (
        (everything((4, 6)), torch.empty(4, 5)),
        (everything((4, 6)), torch.empty(6, 4).T),
        (everything((4, 6)), torch.empty(4, 6, dtype=torch.float64)),
        ((slice(0, 4), slice(1, 7)), torch.empty(4, 6)),
        ((slice(-1, 3), slice(0, 6)), torch.empty(4, 6)),
    ):
        with pytest.raises(ValueError, match=r"must be float32|are not all of a matrix"):
            combined.fill(at, out)
    bits = np.zeros(3 + BITS_PADDING, np.uint8)
    assert backend.combined([Term(held, bits=bits)], Rule()).shape == (4, 6)
    for terms, match in (
        ([Term(product), Term(held)], "beside"),
        ([Term(held), Term(Operand(None, torch.ones(6, 4)))], "beside"),
        ([Term(held), Term(Operand(None, torch.ones(4, 6).half()))], "operands are"),
        ([Term(Operand(None, torch.ones(4, 6).double()))], "operands are torch.float64"),
        ([Term(Operand(torch.ones(4, 3), torch.ones(2, 6)))], "a product of"),
        ([Term(held, bits=bits[:-1])], "bits are"),
        ([Term(held, bits=bits.astype(np.bool_))], "bits are"),
    ):
        with pytest.raises(ValueError, match=match):
            backend.combined(terms, Rule())
    for operand in (Operand(None, torch.ones(4, 6).double()), Operand(torch.ones(4, 3), torch.ones(2, 6))):
        with pytest.raises(ValueError, match=r"operands are torch.float64|a product of"):
            backend.gathered(operand, 0.0, 1.0)


@pytest.mark.parametrize(
    ("block", "to", "of"),
    [
        (torch.ones(5, 16), torch.ones(4, 16), 0.0),
        (torch.ones(6, 16), torch.ones(3, 16), 0.0),
        (torch.ones(6, 16), torch.ones(4, 32), 0.0),
        (torch.ones(6, 16), torch.ones(4, 16), 1.0),
        (torch.ones(16, 6).T, torch.ones(4, 16), 0.0),
        (torch.ones(6, 16), torch.ones(4, 16, dtype=torch.float64), 0.0),
    ],
    ids=["a short block", "a short result", "other columns", "other rows", "strides", "another dtype"],
)
def test_blocks_that_a_kernel_must_not_be_given(block: torch.Tensor, to: torch.Tensor, of: float) -> None:
    pieces = CpuMerging().pieces([Piece(torch.ones(3, 5), row=1, column=1)])
    with pytest.raises(ValueError, match="block"):
        pieces.add_product(block, to, of=of)


def test_the_fastest_is_chosen() -> None:
    assert choose_merging("auto").name == "cpu"
    assert choose_merging("reference").name == "reference"
    with pytest.raises(ValueError, match="merging backend 'triton' cannot run: there is no such backend"):
        choose_merging("triton")
