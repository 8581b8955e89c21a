"""Compiles the attention kernels for a GPU that need not be there, and prints what came out, as JSON.

Run as a program of its own (``test_attention_compiles`` does), because Triton decides at import whether it interprets.
float16 has bfloat16's tiles, so one shape is enough for it; float32, which is for tests, has two sorts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex_kernels.attention import triton as kernels
from loraplex_kernels.attention.tiles import tiles_for
from tests.ops.compile_lora_kernels import resources

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COUNTED = ("mma.sync", "wgmma.mma_async", "cp.async.cg.shared.global")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's heads and pages, and the dtypes that it is compiled for."""

    head_dim: int
    group: int
    kv_heads: int
    page: int
    dtypes: tuple[str, ...] = ("bf16",)


SHAPES: Mapping[str, Shape] = {
    "llama-3.1-8b": Shape(128, 4, 8, 16, ("bf16", "fp16", "fp32")),
    "smollm2": Shape(64, 3, 3, 16),
    "gemma-2b": Shape(256, 8, 1, 16, ("bf16", "fp32")),
    "head of 80, large pages": Shape(80, 1, 32, 256),
}


@dataclass(frozen=True, slots=True)
class Compiler:
    """For one dtype and head dimension: strides are multiples of 16 where the head's is."""

    dtype: str
    head_dim: int

    def compiled(self, kernel: Any, constants: Mapping[str, object], warps: int = 4, stages: int = 3) -> dict[str, int]:
        """What comes of a kernel: its resources, and how often it has each of ``COUNTED``."""
        signature: dict[str, str] = {}
        attributes = {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = self._type(name)
            if self.head_dim % 16 == 0 if name.startswith("stride") else signature[name].startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
        options = {"num_warps": warps, "num_stages": stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        counts = {name: made.asm["ptx"].count(name) for name in COUNTED}
        return {"shared": made.metadata.shared, **resources(made.asm["cubin"]), **counts}

    def _type(self, name: str) -> str:
        if name in ("meta", "slots"):
            return "*i32"
        if name in ("partials", "sums"):
            return "*fp32"
        if name == "scale":
            return "fp32"
        if name.startswith("stride") or name in ("window", "num_rows"):
            return "i32"
        return f"*{self.dtype}"


def kernels_of(shape: Shape, dtype: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Each kernel's name, and what came of it."""
    compiler, tiles = Compiler(dtype, shape.head_dim), tiles_for(shape.head_dim, shape.group, DTYPES[dtype])
    heads = {"HEAD_DIM": shape.head_dim, "DIM": tiles.dim}
    for form, tile in (("decode", tiles.decode), ("chunk", tiles.chunk)):
        cut = {"DECODE": form == "decode", "TILE": tile.queries, "ROWS": tile.rows, "KEYS": tile.keys}
        constants = {"KV_HEADS": shape.kv_heads, "GROUP": shape.group, "PAGE": shape.page, **heads, **cut}
        yield form, compiler.compiled(kernels._attend_kernel, constants, tile.warps, tile.stages)
    splits = {"TILE": tiles.chunk.queries, "SPLITS": kernels.COMBINE_SPLITS}
    yield (
        "combine",
        compiler.compiled(kernels._combine_kernel, {"HEADS": shape.kv_heads * shape.group, **splits, **heads}),
    )
    written = {"KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim, "PAGE": shape.page, "ROWS": 4, "COLUMNS": 1024}
    yield "write", compiler.compiled(kernels._write_kernel, written)


def records() -> Iterator[dict[str, object]]:
    """One of each kernel of each shape and dtype."""
    for name, shape in SHAPES.items():
        for dtype in shape.dtypes:
            for kernel, made in kernels_of(shape, dtype):
                yield {"shape": name, "dtype": dtype, "kernel": kernel, **made}


if __name__ == "__main__":
    json.dump(list(records()), sys.stdout)
