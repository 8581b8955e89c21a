"""Every attention kernel compiles for sm_90, in each dtype: no spilled registers, tensor cores, wide copies.

Needs no GPU: Triton ships the assembler. In a process of its own, because this one may have the interpreter.
float16 has bfloat16's tiles, so one shape is enough for it; float32, which is for tests, has two sorts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CODE = """
import json, re, subprocess, sys, tempfile
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loraplex_kernels.attention import triton as kernels
from loraplex_kernels.attention.tiles import tiles_for

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COUNTED = ("mma.sync", "wgmma.mma_async", "cp.async.cg.shared.global")


def compiled(kernel, kind, constants, head_dim, warps=4, stages=3):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("meta", "slots"):
            signature[name] = "*i32"
        elif name in ("partials", "sums"):
            signature[name] = "*fp32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name.startswith("stride") or name in ("window", "num_rows"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + kind
        aligned = head_dim % 16 == 0 if name.startswith("stride") else signature[name].startswith("*")
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\\d+) registers", said)[1]),
        "spilled": max(map(int, re.findall(r"(\\d+) bytes spill stores", said))),
        "shared": made.metadata.shared,
        **{name: made.asm["ptx"].count(name) for name in COUNTED},
    }


def of_kind(kind, head_dim, group, kv_heads, page):
    tiles = tiles_for(head_dim, group, KINDS[kind])
    shape = {"HEAD_DIM": head_dim, "DIM": tiles.dim}
    for form, tile in (("decode", tiles.decode), ("chunk", tiles.chunk)):
        cut = {"DECODE": form == "decode", "TILE": tile.queries, "ROWS": tile.rows, "KEYS": tile.keys}
        constants = {"KV_HEADS": kv_heads, "GROUP": group, "PAGE": page, **shape, **cut}
        yield form, compiled(kernels._attend_kernel, kind, constants, head_dim, tile.warps, tile.stages)
    joined = {"HEADS": kv_heads * group, "TILE": tiles.chunk.queries, "SPLITS": kernels.COMBINE_SPLITS, **shape}
    yield "combine", compiled(kernels._combine_kernel, kind, joined, head_dim)
    written = {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE": page, "ROWS": 4, "COLUMNS": 1024}
    yield "write", compiled(kernels._write_kernel, kind, written, head_dim)


asked = json.loads(sys.argv[1])
print(json.dumps({
    name: {form + " " + kind: result for kind in kinds for form, result in of_kind(kind, *shape)}
    for name, (shape, kinds) in asked.items()
}))
"""
#: name -> (head dimension, group, key/value heads, page size), and the dtypes
SHAPES = {
    "llama-3.1-8b": ([128, 4, 8, 16], ["bf16", "fp16", "fp32"]),
    "smollm2": ([64, 3, 3, 16], ["bf16"]),
    "gemma-2b": ([256, 8, 1, 16], ["bf16", "fp32"]),
    "head of 80, large pages": ([80, 1, 32, 256], ["bf16"]),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    """Shape -> kernel and dtype -> what the compiler says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CODE, json.dumps(SHAPES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile_for_hopper(compiled: dict[str, dict[str, dict[str, int]]], shape: str) -> None:
    results = compiled[shape]
    assert len(results) == 4 * len(SHAPES[shape][1])
    for name, result in results.items():
        assert result["spilled"] == 0, (name, result)
        assert result["shared"] <= 227 * 1024, (name, result)
        if name.startswith(("decode", "chunk")):
            assert result["cp.async.cg.shared.global"] > 0, (name, result)  # 16 bytes at a time
            products = result["mma.sync"] + result["wgmma.mma_async"]
            assert (products > 0) == (not name.endswith("fp32")), (name, result)
