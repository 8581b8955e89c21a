"""The kernels of quantized products go through Triton's compiler down to machine code, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex_kernels.quant.device_layout import FORMS
from tests.ops.compile_records import compiled

triton = pytest.importorskip("triton", reason="the package triton is not installed")

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
#: registers of a multiprocessor, and the least shared memory of one since Ampere, of which each program costs 1 KiB
REGISTERS, SHARED_BYTES, RESERVED_BYTES = 65536, 99 * 1024, 1024
#: a handful of registers; the next tile's bytes are worth more
SPILLED_BYTES = 64


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compiled("tests.ops.compile_quant_kernels")


def test_every_kernel_compiles(records: list[dict[str, Any]]) -> None:
    assert {record["kernel"] for record in records} == {"product", "joined", "rows"}
    assert len(records) == 14


def test_all_programs_of_a_launch_fit_a_multiprocessor(records: list[dict[str, Any]]) -> None:
    """What the joined kernel's freedom from deadlock rests on."""
    for record in records:
        if record["kernel"] != "rows":
            programs, registers = FORMS.of(record["rows"]).resident(ITEMSIZE[record["dtype"]])
            assert record["registers"] <= registers, record
            assert programs * record["warps"] * 32 * registers <= REGISTERS, record
            assert programs * (record["shared"] + RESERVED_BYTES) <= SHARED_BYTES, record


def test_next_to_nothing_spills(records: list[dict[str, Any]]) -> None:
    """In the dtypes that are served on GPUs; float32 is there for tests."""
    assert not [record for record in records if record["spilled"] > SPILLED_BYTES and record["dtype"] != "fp32"]


def test_wide_loads_and_matrix_instructions(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert "16 bytes a thread" in record["features"], record
        if record["kernel"] != "rows" and record["dtype"] != "fp32":
            assert "matrix instruction" in record["features"], record


def test_the_joined_kernel_orders_its_memory(records: list[dict[str, Any]]) -> None:
    orders = {"release", "acquire", "h from the second cache"}
    for record in records:
        if record["kernel"] == "joined":
            assert orders <= set(record["features"]), record
