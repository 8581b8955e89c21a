"""Compiles the launches of the device lora op for a GPU that need not be there, and prints what came out, as JSON.

Run as a program of its own (``test_triton_compiles`` does), because Triton decides at import whether it interprets.
The launches are those of the op itself, recorded on CPU tensors and not run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels, Launch
from loraplex_kernels.lora.device_layout import DECODE_ROWS, WIDE_ROWS
from loraplex_kernels.lora.triton import KERNELS
from loraplex_kernels.lora.uploads import DirectQueue
from loraplex_kernels.segments import Term, plan_rows

CPU = torch.device("cpu")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
#: in, parts
Table = tuple[int, tuple[int, ...]]
#: q, k and v of an 8B model
LARGE: Table = (4096, (4096, 1024, 1024))
#: form -> rows of a step that takes it
NUM_ROWS = {"decode": 1, "wide": DECODE_ROWS + 1, "prefill": WIDE_ROWS + 1}
#: sizes that Triton specializes on (1), and that nothing divides
ODD: tuple[Table, ...] = ((1, (1,)), (37, (13, 5, 9)))
#: instructions that a fast kernel has, and orders that a right one has
FEATURES = {
    "16 bytes a thread": r"ld\.global[^\n]*\.v4|cp\.async\.cg",
    "matrix instruction": r"mma\.sync|wgmma\.mma_async",
    "release": r"bar\.sync[^@]*@\S+ atom\.\S*release",
    "acquire": r"@\S+ (?:atom|ld)\.\S*acquire",  # adding zero may become a load
    "h from the second cache": r"ld\.global\.cg",
}


def launches(table_shape: Table, dtype: torch.dtype, num_rows: int) -> list[Launch]:
    """Every launch of the op, for a step of ``num_rows`` rows."""
    in_features, parts = table_shape
    found: list[Launch] = []
    for fused in (False, True):
        backend = DeviceLora("", GridKernels(KERNELS, fused=fused, launcher=found.append), DirectQueue)
        table = backend.new_table(in_features, parts, dtype=dtype, device=CPU, max_bytes=1 << 30)
        delta = SlotDelta((PartDelta(shift=torch.ones(parts[0])), *[None] * (len(parts) - 1)), torch.ones(in_features))
        table.write(0, table.pack(delta))
        plan = backend.prepare(plan_rows([(num_rows, (Term(0),))]))
        x, y = torch.zeros(num_rows, in_features, dtype=dtype), torch.zeros(num_rows, sum(parts), dtype=dtype)
        table.add_(y, x, plan)
    table.add_lookup_(y, torch.zeros(num_rows, dtype=torch.int64), plan)
    table.scale_input(x, plan)
    return found


def compiled(launch: Launch, capability: int) -> dict[str, object]:
    """What the compiler says of a launch's kernel, specialized as Triton specializes it when it is launched."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif value is None or (value == 1 and not launch.kernel.params[index].do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {}
    for name, value in launch.options.items():
        if name in launch.kernel.arg_names:
            signature[name], constants[name] = "constexpr", value
        else:
            options[name] = value
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = re.sub(r"//[^\n]*", "", kernel.asm["ptx"])
    return {
        "kernel": launch.kernel.__name__.lstrip("_") + (" lookup" if constants.get("LOOKUP") else ""),
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
        "features": [name for name, pattern in FEATURES.items() if re.search(pattern, ptx, re.DOTALL)],
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory: those are spills, because the kernels have no arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def records() -> Iterator[dict[str, object]]:
    """Every kernel in every dtype for Hopper, those of bfloat16 for Ampere, and those of odd tables.

    Every form in bfloat16 on Hopper; elsewhere its ends. Tiles of float16 are those of bfloat16: one form is enough.
    """
    ends = ("decode", "prefill")
    cases = [
        (90, LARGE, torch.bfloat16, tuple(NUM_ROWS)),
        (90, LARGE, torch.float16, ("decode",)),
        (90, LARGE, torch.float32, ends),
        (80, LARGE, torch.bfloat16, ends),
        (90, ODD[0], torch.bfloat16, ends),
        (90, ODD[1], torch.bfloat16, ("decode", "wide")),
    ]
    for capability, table, dtype, forms in cases:
        for form in forms:
            num_rows = NUM_ROWS[form]
            where = {"capability": capability, "dtype": TYPES[dtype], "form": form, "large": table is LARGE}
            for launch in launches(table, dtype, num_rows):
                yield where | compiled(launch, capability)


if __name__ == "__main__":
    json.dump(list(records()), sys.stdout)
