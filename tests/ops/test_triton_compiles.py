"""The device lora op's kernels go through Triton's compiler down to machine code, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex_kernels.lora.device_layout import FORMS
from tests.ops.compile_records import compiled

triton = pytest.importorskip("triton", reason="the package triton is not installed")

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
#: registers of a multiprocessor, and the least shared memory of one since Ampere, of which each program costs 1 KiB
REGISTERS, SHARED_BYTES, RESERVED_BYTES = 65536, 99 * 1024, 1024
FORM_NAMES = {"decode", "wide", "prefill"}
KERNELS = ["expand", "expand lookup", "fused", "scale", "shrink"]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compiled("tests.ops.compile_lora_kernels")


def test_every_kernel_compiles_in_every_dtype_and_in_every_form(records: list[dict[str, Any]]) -> None:
    keys = ("capability", "dtype", "form", "large")
    seen = {tuple(record[key] for key in keys) for record in records}
    assert len(seen) == 11
    assert {dtype for _, dtype, _, _ in seen} == set(ITEMSIZE)
    for large in (True, False):
        assert {form for capability, _, form, at in seen if (capability, at) == (90, large)} == FORM_NAMES
    for where in seen:
        kernels = [record["kernel"] for record in records if tuple(record[key] for key in keys) == where]
        assert sorted(set(kernels)) == KERNELS, where


def test_all_programs_of_a_launch_fit_a_multiprocessor(records: list[dict[str, Any]]) -> None:
    """What the fused kernel's freedom from deadlock rests on, and what the grid of the others counts on."""
    for record in records:
        form = getattr(FORMS, record["form"])
        programs, registers = form.resident(ITEMSIZE[record["dtype"]])
        assert record["registers"] <= registers, record
        assert programs * record["warps"] * 32 * registers <= REGISTERS, record
        assert programs * (record["shared"] + RESERVED_BYTES) <= SHARED_BYTES, record


def test_nothing_spills(records: list[dict[str, Any]]) -> None:
    """In the dtypes that are served on GPUs; float32 is there for tests."""
    spilled = [record for record in records if record["spilled"] and record["dtype"] != "fp32"]
    assert not [record for record in spilled if record["capability"] == 90 and record["large"]]


def test_wide_loads_and_matrix_instructions(records: list[dict[str, Any]]) -> None:
    for record in (record for record in records if record["large"]):
        assert "16 bytes a thread" in record["features"], record
        if record["kernel"] != "scale" and record["dtype"] != "fp32":
            assert "matrix instruction" in record["features"], record


def test_the_fused_kernel_orders_its_memory(records: list[dict[str, Any]]) -> None:
    orders = {"release", "acquire", "h from the second cache"}
    for record in records:
        has = orders.intersection(record["features"])
        if record["kernel"] == "fused":
            assert has == orders, record
        else:
            assert not has & {"release", "acquire"}, record
