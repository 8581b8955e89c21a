"""Runs the joined kernel as several programs at once, as ``fused_in_processes`` runs the fused one.

Run as a program of its own (``test_quant_processes`` does), because it forks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import expected_output, mixed_slots, worst_excess
from tests.ops.fused_in_processes import CPU, Processes, SharedQueue
from tests.ops.lora_device import SMALL_FORM, Forms, load_kernels, make_lora
from tests.ops.programs_at_once import WrongLaunch, answer
from tests.ops.quant_device import make_quant, product
from tests.ops.stored_matrices import stored_matrix

IN, PARTS = 256, (32, 24)
LAUNCHES = 2


def launch_a_few(num_programs: int, kernels: Path) -> None:
    """Raises WrongLaunch."""
    generator = torch.Generator().manual_seed(2)
    slots = mixed_slots(6, IN, PARTS, torch.float32, generator)
    run, queue = Processes(num_programs), SharedQueue(CPU)
    lora = make_lora(fused=True, forms=Forms(SMALL_FORM, SMALL_FORM, SMALL_FORM), recorder=run, queue=queue)
    quant = make_quant(launcher=run, queue=queue, module=load_kernels(kernels))
    parts = tuple(stored_matrix("nf4", size, IN, seed=size) for size in PARTS)
    matrix = quant.matrix(parts, torch.float32)
    table = lora.new_table(IN, PARTS, dtype=torch.float32, device=CPU, max_bytes=1 << 30)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    join = matrix.join(table)
    assert join is not None
    for launch in range(LAUNCHES):
        plan = plan_rows([(1, (Term(launch), Term(4, 0.5))), (3, ()), (8, (Term(2),)), (1, (Term(5),))])
        x = torch.randn(plan.num_rows, IN, generator=generator)
        y = join(x, x, None, lora.prepare(plan))
        expected = expected_output(product(parts, x, None, torch.float32), x, plan, slots, PARTS)
        if worst_excess(y, expected, y.dtype) > 1:
            raise WrongLaunch(f"launch {launch}: {worst_excess(y, expected, y.dtype)} times the tolerance")


if __name__ == "__main__":
    answer(launch_a_few)
