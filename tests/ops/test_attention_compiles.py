"""Every attention kernel compiles for sm_90, in each dtype: no spilled registers, tensor cores, wide copies.

Needs no GPU: Triton ships the assembler.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.compile_records import compiled

triton = pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = ["chunk", "combine", "decode", "write"]
#: shape -> dtypes
SHAPES = {
    "llama-3.1-8b": ["bf16", "fp16", "fp32"],
    "smollm2": ["bf16"],
    "gemma-2b": ["bf16", "fp32"],
    "head of 80, large pages": ["bf16"],
}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compiled("tests.ops.compile_attention_kernels")


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile_for_hopper(records: list[dict[str, Any]], shape: str) -> None:
    of_shape = [record for record in records if record["shape"] == shape]
    for dtype in SHAPES[shape]:
        assert sorted(record["kernel"] for record in of_shape if record["dtype"] == dtype) == KERNELS
    assert len(of_shape) == len(KERNELS) * len(SHAPES[shape])
    for record in of_shape:
        assert record["spilled"] == 0, record
        assert record["shared"] <= 227 * 1024, record
        if record["kernel"] in ("decode", "chunk"):
            assert record["cp.async.cg.shared.global"] > 0, record  # 16 bytes at a time
            products = record["mma.sync"] + record["wgmma.mma_async"]
            assert (products > 0) == (record["dtype"] != "fp32"), record
