"""What every backend of quantized products must do, on every stored form.

The oracle is the product, in float64, with the weights that ``stored.decode`` gives.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.quant import QuantBackend
from loraplex_kernels.quant.cpu import CpuQuant
from loraplex_kernels.quant.reference import ReferenceQuant
from loraplex_kernels.quant.stored import NestedScales, PlainScales, StoredMatrix, SuperScales, decode
from tests.ops.stored_matrices import FORMS, poisoned_padding, stored_matrix

BACKENDS: Mapping[str, Callable[[], QuantBackend]] = {
    "reference": ReferenceQuant,
    "cpu": CpuQuant,
    "cpu-by-torch": lambda: CpuQuant(compiled=False),
    **({"cpu-without-avx512": lambda: CpuQuant(processor="haswell")} if platform.machine() == "x86_64" else {}),
}
#: of the largest value of y: sums of float32, and one rounding to bfloat16
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
DTYPES = tuple(TOLERANCE)


@pytest.fixture(params=tuple(BACKENDS))
def backend(request: pytest.FixtureRequest) -> QuantBackend:
    return BACKENDS[request.param]()


def inputs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def expected(x: torch.Tensor, parts: tuple[StoredMatrix, ...], bias: torch.Tensor | None) -> torch.Tensor:
    weights = torch.cat([decode(part, x.dtype) for part in parts]).double()
    y = x.double() @ weights.T
    return y if bias is None else y + bias.double()


def assert_close(y: torch.Tensor, wanted: torch.Tensor) -> None:
    assert y.shape == wanted.shape
    assert y.is_contiguous()
    assert (y.double() - wanted).abs().max() <= TOLERANCE[y.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_decoded_weights(backend: QuantBackend, form: str, dtype: torch.dtype) -> None:
    # a tail of rows in every tile and block; two parts of one form, whose scales and orders are their own
    parts = stored_matrix(form, 133, 256), stored_matrix(form, 6, 256, seed=1)
    matrix = backend.matrix(parts, dtype)
    assert matrix.shape == (139, 256)
    assert matrix.nbytes == sum(part.nbytes for part in parts)
    bias = inputs(139, 1, dtype).flatten()
    for rows in (0, 1, 2, 3, 4, 7, 8, 9, 17):
        x = inputs(rows, 256, dtype)
        y = matrix.multiply(x, None)
        assert y.dtype is dtype
        if rows:
            assert_close(y, expected(x, parts, None))
            assert_close(matrix.multiply(x, bias), expected(x, parts, bias))
            assert torch.equal(matrix.multiply(x, None), y)  # the same bits again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlike_parts_stand_in_one_matrix(backend: QuantBackend, dtype: torch.dtype) -> None:
    parts = tuple(stored_matrix(form, 20 + i, 256, seed=i) for i, form in enumerate(FORMS))
    matrix = backend.matrix(parts, dtype)
    bias = inputs(matrix.shape[0], 1, dtype).flatten()
    for rows in (1, 9):
        x = inputs(rows, 256, dtype)
        y, wanted, first = matrix.multiply(x, bias), expected(x, parts, bias), 0
        for part in parts:  # their sizes differ
            columns = slice(first, first + part.shape[0])
            assert (y[:, columns].double() - wanted[:, columns]).abs().max() <= TOLERANCE[dtype] * (
                wanted[:, columns].abs().max()
            )
            first += part.shape[0]


@pytest.mark.parametrize("form", FORMS)
def test_dequantize_and_look_up_are_the_decoded_weights(backend: QuantBackend, form: str) -> None:
    parts = stored_matrix(form, 300, 256), stored_matrix(form, 7, 256, seed=1)
    weights = torch.cat([decode(part, torch.float32) for part in parts])
    matrix = backend.matrix(parts, torch.float32)
    assert torch.equal(matrix.dequantize(), weights)
    for indices in ([], [0], [306, 299, 300, 5, 5, 128]):
        ids = torch.tensor(indices, dtype=torch.int64)
        assert torch.equal(matrix.look_up(ids), weights[ids])


@pytest.mark.parametrize("columns", [32, 96, 160])
@pytest.mark.parametrize("form", ["uint4-zero", "uint4-shift", "int8", "int8-row", "uint4-row", "uint4-order"])
def test_columns_need_not_fill_a_run_of_codes(backend: QuantBackend, form: str, columns: int) -> None:
    parts = (poisoned_padding(stored_matrix(form, 10, columns)),)
    for rows in (1, 12):
        x = inputs(rows, columns, torch.float32)
        assert_close(backend.matrix(parts, torch.float32).multiply(x, None), expected(x, parts, None))


@pytest.mark.parametrize("rows", [4, 20])
def test_nothing_of_one_row_reaches_another(backend: QuantBackend, rows: int) -> None:
    matrix = backend.matrix((stored_matrix("nf4", 70, 128),), torch.float32)
    x = inputs(rows, 128, torch.float32)
    clean = matrix.multiply(x, None)
    for poison in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1] = poison
        y = matrix.multiply(spoiled, None)
        others = [row for row in range(rows) if row != 1]
        assert torch.equal(y[others], clean[others])
        assert not y[1].isfinite().any()


def test_rows_of_x_may_lie_apart(backend: QuantBackend) -> None:
    parts = (stored_matrix("uint4-zeros", 40, 256),)
    wide = inputs(9, 400, torch.float32)
    x = wide[:, 100:356]
    assert_close(backend.matrix(parts, torch.float32).multiply(x, None), expected(x, parts, None))


def test_parts_of_unlike_columns_are_refused(backend: QuantBackend) -> None:
    with pytest.raises(ValueError, match=r"\[128, 256\] columns"):
        backend.matrix((stored_matrix("nf4", 4, 128), stored_matrix("nf4", 4, 256)), torch.float32)


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(2, 64), None),
        (torch.zeros(2, 128, dtype=torch.bfloat16), None),
        (torch.zeros(2, 128), torch.zeros(3)),
        (torch.zeros(2, 128), torch.zeros(8)[::2]),
        (torch.zeros(2, 128), torch.zeros(4, dtype=torch.bfloat16)),
    ],
    ids=["columns", "dtype", "bias-size", "bias-stride", "bias-dtype"],
)
def test_what_does_not_fit_is_refused_before_a_kernel_reads_it(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    matrix = CpuQuant().matrix((stored_matrix("nf4", 4, 128),), torch.float32)
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        matrix.multiply(x, bias)


def test_a_stored_matrix_says_what_does_not_fit() -> None:
    stored = stored_matrix("nf4", 4, 128)
    with pytest.raises(ValueError, match=r"codes are torch.uint8 \[4, 64\], expected uint8 \[5, 64\]"):
        replace(stored, shape=(5, 128))
    with pytest.raises(ValueError, match=r"scales are \[4, 2\], expected \[4, 4\]"):
        replace(stored, scheme=replace(stored.scheme, group=32))
    shifted, nested, upper = (stored_matrix(form, 40, 256) for form in ("uint4-shift", "nf4-nested", "uint4-super"))
    assert isinstance(shifted.scales, PlainScales)
    assert isinstance(nested.scales, NestedScales)
    assert isinstance(upper.scales, SuperScales)
    for whole, scales in (
        (shifted, replace(shifted.scales, shifts=torch.zeros(40, 7))),
        (nested, replace(nested.scales, outer=nested.scales.outer[:-1])),
        (nested, replace(nested.scales, first=-1)),
        (upper, replace(upper.scales, mins=torch.zeros(40, 7, dtype=torch.uint8))),
        (upper, replace(upper.scales, outer_scales=torch.zeros(39, 1, dtype=torch.float16))),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            replace(whole, scales=scales)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    matrix = CpuQuant().matrix((stored_matrix("nf4", 133, 256), stored_matrix("nf4", 3, 256)), torch.float32)
    before = torch.get_num_threads()
    for rows in (1, 20):
        x = inputs(rows, 256, torch.float32)
        expected = matrix.multiply(x, None)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(matrix.multiply(x, None), expected)
        finally:
            torch.set_num_threads(before)
