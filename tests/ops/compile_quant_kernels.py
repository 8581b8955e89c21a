"""Compiles the launches of quantized products for a GPU that need not be there, and prints what came out, as JSON.

Run as a program of its own (``test_quant_compiles`` does), because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels, Launch
from loraplex_kernels.lora.triton import KERNELS as LORA_KERNELS
from loraplex_kernels.lora.uploads import DirectQueue
from loraplex_kernels.quant.device import DeviceQuant
from loraplex_kernels.quant.device_launch import QuantKernels
from loraplex_kernels.quant.device_layout import FORMS
from loraplex_kernels.quant.triton import KERNELS
from loraplex_kernels.segments import Term, plan_rows
from tests.ops.compile_lora_kernels import CPU, TYPES, compiled
from tests.ops.stored_matrices import stored_matrix

IN, PARTS = 4096, (512, 256, 256)
#: rows of steps that take each form in turn
ROWS = tuple(form.block_m for form in FORMS.all)
#: (GPU, stored form, dtype, rows, kernels): decode steps in every kind of form, then nf4 in every size and place
CASES = (
    *((90, form, torch.bfloat16, 16, ("product",)) for form in ("uint4-zeros", "uint6-super", "e4m3-block", "int8")),
    *((90, form, torch.bfloat16, 16, ("joined",)) for form in ("nf4-nested", "uint4-super")),
    (90, "nf4-rounded", torch.bfloat16, 16, ("product", "joined", "rows")),
    *((90, "nf4-rounded", torch.bfloat16, rows, ("joined",)) for rows in ROWS[1:3]),
    (90, "nf4-rounded", torch.bfloat16, ROWS[3], ("product",)),
    (90, "nf4", torch.float32, 16, ("joined",)),
    (80, "nf4-rounded", torch.bfloat16, 16, ("joined",)),
)


def launches(form: str, dtype: torch.dtype, num_rows: int) -> list[Launch]:
    """Every launch of a layer with that many rows."""
    found: list[Launch] = []
    quant = DeviceQuant("", QuantKernels(KERNELS, launcher=found.append), DirectQueue)
    matrix = quant.matrix([stored_matrix(form, size, IN) for size in PARTS], dtype)
    x = torch.zeros(num_rows, IN, dtype=dtype)
    matrix.multiply(x, torch.zeros(sum(PARTS), dtype=dtype))
    matrix.look_up(torch.zeros(1, dtype=torch.int64))
    lora = DeviceLora("", GridKernels(LORA_KERNELS, fused=True, launcher=found.append), DirectQueue)
    table = lora.new_table(IN, PARTS, dtype=dtype, device=CPU, max_bytes=1 << 30)
    table.write(0, table.pack(SlotDelta((PartDelta(shift=torch.ones(PARTS[0])), None, None))))
    join = matrix.join(table)
    if join is not None:
        join(x, x, None, lora.prepare(plan_rows([(num_rows, (Term(0),))])))
    return found


def records() -> Iterator[dict[str, object]]:
    """One of each kernel of each case."""
    for capability, form, dtype, num_rows, kernels in CASES:
        done = set()
        for launch in launches(form, dtype, num_rows):
            name = launch.kernel.__name__.lstrip("_")
            if name in kernels and name not in done:
                done.add(name)
                where = {"capability": capability, "dtype": TYPES[dtype], "stored": form, "rows": num_rows}
                yield where | compiled(launch, capability)


if __name__ == "__main__":
    json.dump(list(records()), sys.stdout)
