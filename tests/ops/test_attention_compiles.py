"""Every attention kernel compiles for sm_90, in each dtype: no spilled registers, tensor cores, wide copies.

Needs no GPU: Triton ships the assembler. In a process of its own, because this one may have the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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

HEAD_DIM, GROUP, KV_HEADS, PAGE = json.loads(sys.argv[1])
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COUNTED = ("mma.sync", "wgmma.mma_async", "cp.async.cg.shared.global")


def compiled(kernel, kind, constants, warps=4, stages=3):
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
        aligned = HEAD_DIM % 16 == 0 if name.startswith("stride") else signature[name].startswith("*")
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


results = {}
for kind, dtype in KINDS.items():
    tiles = tiles_for(HEAD_DIM, GROUP, dtype)
    shape = {"HEAD_DIM": HEAD_DIM, "DIM": tiles.dim}
    for form, tile in (("decode", tiles.decode), ("chunk", tiles.chunk)):
        cut = {"DECODE": form == "decode", "TILE": tile.queries, "ROWS": tile.rows, "KEYS": tile.keys}
        constants = {"KV_HEADS": KV_HEADS, "GROUP": GROUP, "PAGE": PAGE, **shape, **cut}
        results[form + " " + kind] = compiled(kernels._attend_kernel, kind, constants, tile.warps, tile.stages)
    joined = {"HEADS": KV_HEADS * GROUP, "TILE": tiles.chunk.queries, "SPLITS": kernels.COMBINE_SPLITS, **shape}
    results["combine " + kind] = compiled(kernels._combine_kernel, kind, joined)
    written = {"KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD_DIM, "PAGE": PAGE, "ROWS": 4, "COLUMNS": 1024}
    results["write " + kind] = compiled(kernels._write_kernel, kind, written)
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param([128, 4, 8, 16], id="llama-3.1-8b"),
        pytest.param([64, 3, 3, 16], id="smollm2"),
        pytest.param([256, 8, 1, 16], id="gemma-2b"),
        pytest.param([80, 1, 32, 256], id="head of 80, large pages"),
    ],
)
def test_kernels_compile_for_hopper(shape: list[int], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CODE, json.dumps(shape)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) == 12
    for name, result in results.items():
        assert result["spilled"] == 0, (name, result)
        assert result["shared"] <= 227 * 1024, (name, result)
        if name.startswith(("decode", "chunk")):
            assert result["cp.async.cg.shared.global"] > 0, (name, result)  # 16 bytes at a time
            products = result["mma.sync"] + result["wgmma.mma_async"]
            assert (products > 0) == (not name.endswith("fp32")), (name, result)
