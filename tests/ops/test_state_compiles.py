"""The kernels of the convolution and the scan go through Triton's compiler to machine code, on a machine without a
GPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.compile_records import compiled

triton = pytest.importorskip("triton", reason="the package triton is not installed")

#: of a scan, a convolution, and a gate with a norm and without; the convolution's with rows and without
LAYER = ["chunk_scan", "chunk_states", "convolve", "convolve", "gate", "gate", "pass_states", "update"]
#: registers of a multiprocessor, and shared memory of one of Hopper and of Ampere (1 KiB of each program is taken)
REGISTERS, SHARED_BYTES = 65536, {90: 227 * 1024, 80: 163 * 1024}
#: bytes that a multiprocessor has on their way when 4.3 TB/s are read with a latency of 0.7 us by 132 of them
IN_FLIGHT_BYTES = 23_000


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compiled("tests.ops.compile_state_kernels")


def test_every_kernel_compiles(records: list[dict[str, Any]]) -> None:
    keys = ("capability", "dtype", "model")
    seen = {tuple(record[key] for key in keys) for record in records}
    assert {(capability, model) for capability, dtype, model in seen if dtype == "bf16"} == {
        (90, "mamba2-2.7b"),
        (90, "falcon-h1-34b"),
        (90, "odd"),
        (80, "mamba2-2.7b"),
    }
    for capability in (90, 80):
        where = (capability, "bf16", "mamba2-2.7b")
        assert sorted(r["kernel"] for r in records if tuple(r[key] for key in keys) == where) == LAYER
    assert {dtype for _, dtype, _ in seen} == {"bf16", "fp16", "fp32"}


def test_nothing_spills(records: list[dict[str, Any]]) -> None:
    assert not [record for record in records if record["spilled"]]


def test_programs_fit_beside_each_other(records: list[dict[str, Any]]) -> None:
    """At least two of every kernel, so that one computes while another waits; but for the largest states."""
    for record in records:
        least = 1 if record["model"] == "falcon-h1-34b" else 2
        assert least * record["warps"] * 32 * record["registers"] <= REGISTERS, record
        assert least * (record["shared"] + 1024) <= SHARED_BYTES[record["capability"]], record


def test_wide_loads_and_matrix_instructions(records: list[dict[str, Any]]) -> None:
    for record in (record for record in records if record["model"] != "odd"):
        assert "16 bytes a thread" in record["features"], record
        products = record["kernel"] in ("chunk_states", "chunk_scan") and record["dtype"] != "fp32"
        assert ("matrix instruction" in record["features"]) == products, record


def test_a_decode_keeps_memory_busy(records: list[dict[str, Any]]) -> None:
    """The states that programs of a multiprocessor have asked for at once."""
    for record in (record for record in records if record["kernel"] == "update" and record["model"] != "odd"):
        programs = REGISTERS // (record["warps"] * 32 * record["registers"])
        assert programs * 4096 * 4 >= 2 * IN_FLIGHT_BYTES, record
