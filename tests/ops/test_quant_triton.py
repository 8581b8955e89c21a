"""The device backend of quantized products in Triton's interpreter: every stored form, splits, replays, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_kernels.backend import choose_quant
from loraplex_kernels.quant.device_layout import FORMS as REAL_FORMS
from loraplex_kernels.quant.device_layout import Codes
from loraplex_kernels.quant.packing import pack
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import Values
from loraplex_kernels.testing import worst_excess
from tests.ops.lora_device import PoisonedQueue
from tests.ops.quant_device import Launches, decoded, make_quant, product
from tests.ops.stored_matrices import FORMS, poisoned_padding, stored_matrix

triton = pytest.importorskip("triton", reason="the package triton is not installed")

F32, F16 = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def interpreter() -> None:
    from loraplex_kernels.quant.triton import KERNELS

    if not KERNELS.interpreted:
        pytest.skip("kernels are compiled for the GPU of this machine; these tests are of the interpreter")


def some_parts(form: str, columns: int = 256) -> tuple[StoredMatrix, ...]:
    """Two parts that no tile divides, in memory whose surroundings are the largest codes."""
    return tuple(poisoned_padding(stored_matrix(form, rows, columns, seed)) for seed, rows in enumerate((37, 10)))


def draw(rows: int, columns: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_bit_for_bit_those_of_decode(form: str) -> None:
    parts = some_parts(form)
    matrix = make_quant().matrix(parts, F32)
    weights = decoded(parts, F32)
    assert torch.equal(matrix.dequantize(), weights)
    ids = torch.tensor([0, 46, 36, 37, 3, 3])
    assert torch.equal(matrix.look_up(ids), weights[ids])
    assert matrix.look_up(ids[:0]).shape == (0, 256)
    assert matrix.nbytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_decoded_weights(form: str) -> None:
    dtype = F16 if form in ("nf4-rounded", "uint4-zeros", "uint6-super", "e4m3-rounded") else F32
    parts = some_parts(form)
    matrix = make_quant().matrix(parts, dtype)
    x, bias = draw(3, 256, dtype), draw(1, 47, dtype).flatten()
    y = matrix.multiply(x, bias)
    assert y.dtype is dtype
    assert worst_excess(y, product(parts, x, bias, dtype), dtype) <= 1


def test_more_rows_than_a_tile_and_no_rows() -> None:
    parts = some_parts("nf4")
    matrix = make_quant().matrix(parts, F32)
    x = draw(71, 256)
    assert worst_excess(matrix.multiply(x, None), product(parts, x, None, F32), F32) <= 1
    assert matrix.multiply(x[:0], None).shape == (0, 47)


@pytest.mark.parametrize("columns", [32, 96, 160])
@pytest.mark.parametrize("form", ["uint4-shift", "int8", "uint4-order"])
def test_columns_need_not_fill_a_run_of_codes(form: str, columns: int) -> None:
    parts = some_parts(form, columns)
    matrix = make_quant().matrix(parts, F32)
    x = draw(2, columns)
    assert worst_excess(matrix.multiply(x, None), product(parts, x, None, F32), F32) <= 1
    assert torch.equal(matrix.dequantize(), decoded(parts, F32))


@pytest.mark.parametrize(("values", "group"), [(Values.UINT4, 8), (Values.UINT6, 4), (Values.INT8, 24)])
def test_groups_may_be_of_any_size(values: Values, group: int) -> None:
    columns, generator = 192, torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << values.bits, (20, columns), generator=generator, dtype=torch.uint8)
    scales = PlainScales(torch.rand(20, columns // group, generator=generator) * 0.01)
    parts = (StoredMatrix(Scheme(values, group), (20, columns), pack(codes, values.bits), scales),)
    x = draw(2, columns)
    assert worst_excess(make_quant().matrix(parts, F32).multiply(x, None), product(parts, x, None, F32), F32) <= 1


def test_values_that_are_no_numbers_stay_so() -> None:
    stored = stored_matrix("e4m3-row", 4, 64)
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    parts = (replace(stored, codes=pack(codes, 8)),)
    torch.testing.assert_close(
        make_quant().matrix(parts, F32).dequantize(), decoded(parts, F32), rtol=0, atol=0, equal_nan=True
    )


def test_unlike_parts_stand_in_one_matrix() -> None:
    forms = ("nf4", "uint4-order", "e4m3-block", "nf4-nested", "nf4-nested", "int8-row")
    parts = tuple(stored_matrix(form, 20 + i, 256, seed=i) for i, form in enumerate(forms))
    launches = Launches()
    matrix = make_quant(launcher=launches).matrix(parts, F32)
    x, bias = draw(3, 256), draw(1, 135).flatten()
    y, wanted = matrix.multiply(x, bias), product(parts, x, bias, F32)
    assert launches.names() == ["product"] * 5, "neighbours stored alike are one launch"
    sizes = [20 + i for i in range(6)]
    for mine, theirs in zip(y.split(sizes, 1), wanted.split(sizes, 1), strict=True):
        assert worst_excess(mine, theirs, F32) <= 1


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours() -> None:
    matrix = make_quant().matrix(some_parts("nf4"), F32)
    x = draw(9, 256)
    clean = matrix.multiply(x, None)
    assert torch.equal(matrix.multiply(x, None), clean)
    assert torch.equal(matrix.multiply(x[4:5], None), clean[4:5])
    for poison in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1] = poison
        y = matrix.multiply(spoiled, None)
        others = [row for row in range(9) if row != 1]
        assert torch.equal(y[others], clean[others])
        assert not y[1].isfinite().any()


def test_rows_of_x_may_lie_apart() -> None:
    parts = some_parts("nf4")
    matrix = make_quant().matrix(parts, F32)
    for x in (draw(3, 400)[:, 100:356], draw(256, 3).t(), draw(1, 256).expand(3, -1)):
        assert worst_excess(matrix.multiply(x, None), product(parts, x, None, F32), F32) <= 1


def test_a_replay_multiplies_what_is_then_in_x() -> None:
    """Nothing that a launch holds is made anew for a call, but x and y; another matrix may come in between."""
    launches, parts = Launches(), some_parts("nf4-nested")
    backend = make_quant(launcher=launches)
    matrix = backend.matrix(parts, F32)
    x = draw(3, 256)
    y = matrix.multiply(x, None)
    larger = backend.matrix((stored_matrix("nf4", 150, 256),), F32)
    larger.multiply(x, None)
    del launches.launches[1:]
    x.copy_(draw(4, 256)[:3])
    launches.replay()
    assert worst_excess(y, product(parts, x, None, F32), F32) <= 1


def test_what_a_kernel_could_not_read_is_refused() -> None:
    matrix = make_quant().matrix((stored_matrix("nf4", 4, 128),), F32)
    for x in (torch.zeros(2, 64), torch.zeros(2, 128, dtype=F16), torch.zeros(2, 128, device="meta"), torch.zeros(128)):
        with pytest.raises(ValueError, match=r"the matrix needs torch.float32 \[T, 128\] on cpu"):
            matrix.multiply(x, None)
    with pytest.raises(ValueError, match=r"the bias is \[3\]"):
        matrix.multiply(torch.zeros(2, 128), torch.zeros(3))
    with pytest.raises(ValueError, match=r"indices are torch.int32 \[2\]"):
        matrix.look_up(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[128, 256\] columns"):
        make_quant().matrix((stored_matrix("nf4", 4, 128), stored_matrix("nf4", 4, 256)), F32)
    backend = make_quant()
    backend.matrix((stored_matrix("nf4", 4, 128),), F32)
    with pytest.raises(ValueError, match="first one is on cpu"):
        backend.queue_on(torch.device("meta"))


def test_splits_depend_on_the_matrix_and_the_form_alone() -> None:
    (few, some, more, many), codes = REAL_FORMS.all, Codes(4, 64)
    assert [REAL_FORMS.of(rows) for rows in (1, 16, 17, 64, 65, 5000)] == [few, few, some, more, many, many]
    assert few.splits((4096,), 4096, codes) == 4
    assert few.splits((4096, 1024, 1024), 4096, codes) == 4
    assert few.splits((14336, 14336), 4096, codes) == 1, "column tiles enough"
    assert few.splits((4096,), 14336, codes) == 6
    assert few.splits((4096,), 256, codes) == 1
    for form in REAL_FORMS.all:
        for codes in (Codes(4, 128), Codes(4, 32), Codes(6, 16), Codes(8, 0)):
            chunk, splits = (size((4096,), 14336, codes) for size in (form.chunk, form.splits))
            assert chunk % form.block_k(codes) == 0
            assert (splits - 1) * chunk < 14336 <= splits * chunk


def test_it_is_chosen_by_name_in_the_interpreter() -> None:
    cpu = torch.device("cpu")
    assert choose_quant("triton", cpu).name == "triton"
    assert choose_quant("auto", cpu).name != "triton"
    with pytest.raises(ValueError, match="'triton' cannot run: Triton is in interpreter mode"):
        choose_quant("triton", torch.device("cuda", 0))


def test_poison_is_where_nothing_was_written() -> None:
    """What the other tests rest on: memory that they are given is NaN."""
    assert PoisonedQueue(torch.device("cpu")).allocate(8).view(F32).isnan().all()
