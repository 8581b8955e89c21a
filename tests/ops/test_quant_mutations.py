"""The checks of the quantized products' kernels can fail: each plausible bug, made once, turns them red."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_kernels.testing import worst_excess
from tests.ops.lora_device import load_kernels
from tests.ops.mutants import Ward, text_of
from tests.ops.quant_device import CountersLeft, make_quant, product
from tests.ops.stored_matrices import stored_matrix

triton = pytest.importorskip("triton", reason="the package triton is not installed")

#: what it breaks -> (text of the kernels, what stands there instead, the stored form whose check must turn red)
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "pieces exchanged": (">> (4 * piece)) & 15", ">> (4 - 4 * piece)) & 15", "nf4"),
    "halves of a run exchanged": ("units % 2 * 16", "(1 - units % 2) * 16", "nf4"),
    "even and odd pieces exchanged": ("low = even if piece % 2 == 0", "low = even if piece % 2 == 1", "uint6-super"),
    "high bits of another piece": ("high.to(tl.int32) >> (2 * piece)", "high.to(tl.int32) >> 0", "uint6-super"),
    "zero of the scheme dropped": ("- (8388608.0 + ZERO)", "- 8388608.0", "uint4-zero"),
    "sign of integers dropped": ("(code ^ 128)", "code", "int8"),
    "sign of floats dropped": ("(code & 128) << 24", "(code & 0) << 24", "e4m3-row"),
    "zeros dropped": ("value = value - zero", "value = value", "uint4-zeros"),
    "shift subtracted": ("value = value + shift", "value = value - shift", "uint4-shift"),
    "mins added": ("-(fourth.to", "(fourth.to", "uint4-super"),
    "factor dropped": ("value = value * FACTOR", "value = value", "int8-row"),
    "no rounding": ("tl.where(value == value, even", "tl.where(value != value, even", "nf4-rounded"),
    "rows of a group not shared": ("row // GROUP_ROWS", "row", "e4m3-block"),
    "outer scale of another block": ("block // 256", "block // 128", "nf4-nested"),
    "offset dropped": (" + tl.load(g3 + 3).to(tl.float32, bitcast=True)", "", "nf4-nested"),
    "places of the first part": ("g3 += part * PLACE", "g3 += 0 * part", "nf4-nested"),
    "codes a tile late": ("_codes(code_rows + after // UNIT", "_codes(code_rows + k // UNIT", "nf4"),
    "scales a tile late": ("at = after + grid\n", "at = k + grid\n", "nf4"),
    "second piece's scales a tile late": ("at = after + grid + STEP", "at = k + grid + STEP", "uint4-zero"),
    "one plane too few": ("tl.static_range(1, SPLITS)", "tl.static_range(1, SPLITS - 1)", "nf4"),
    "splits overlap": ("tl.minimum((split + 1) * chunk", "tl.minimum((split + 2) * chunk", "nf4"),
    "bias of another column": ("bias + ns,", "bias + ns * 0,", "nf4"),
    "bias dropped": ("if bias is not None:", "if False:", "nf4"),
    "counters left as they are": ("tl.store(counter, 0)", "pass", "nf4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels_text() -> str:
    return text_of("loraplex_kernels.quant.triton")


def excess(form: str, kernels: Path) -> float:
    """How far a product of a file's kernels is from the formula, as a multiple of what is allowed."""
    columns = 512 if form == "nf4" else 256
    parts = tuple(stored_matrix(form, rows, columns, seed) for seed, rows in enumerate((33, 20)))
    matrix = make_quant(module=load_kernels(kernels)).matrix(parts, torch.float32)
    generator = torch.Generator().manual_seed(5)
    x, bias = torch.randn(2, columns, generator=generator), torch.randn(53, generator=generator)
    try:
        y = matrix.multiply(x, bias)
    except CountersLeft:
        return float("inf")
    return worst_excess(y, product(parts, x, bias, torch.float32), torch.float32)


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    made = Ward()
    yield made
    made.close()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(ward: Ward, name: str, kernels_text: str, tmp_path: Path) -> None:
    before, after, form = MUTATIONS[name]
    assert before in kernels_text, "the mutation's text is no longer in the kernels"
    (tmp_path / "triton.py").write_text(kernels_text.replace(before, after))
    assert ward.judge(excess, form, tmp_path / "triton.py") > 1


@pytest.mark.parametrize("form", sorted({form for _, _, form in MUTATIONS.values()}))
def test_the_kernels_as_they_are_pass(ward: Ward, form: str, kernels_text: str, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(kernels_text)
    assert ward.judge(excess, form, tmp_path / "triton.py") <= 1
