"""Runs the fused lora kernel as several programs at once: one process each, over shared memory, in the interpreter.

Run as a program of its own (``test_lora_processes`` does), because it forks. The interpreter runs the programs of a
launch one after the other; here every process runs the one that it stands for, so that programs really wait for each
other, and the counters are what keeps h from being read too early: the first programs are ahead of the last.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loraplex_kernels.lora import SlotDelta
from loraplex_kernels.lora.device_launch import Launch
from loraplex_kernels.lora.uploads import DirectQueue
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import expected_output, mixed_slots, worst_excess
from tests.ops.lora_device import POISON, SMALL_FORM, Forms, load_kernels, make_lora
from tests.ops.programs_at_once import WrongLaunch, answer

CPU = torch.device("cpu")
IN, PARTS = 70, (40, 24)
LAUNCHES = 3
HEAD_START_S = 0.1


class SharedQueue(DirectQueue):
    """Memory that forked processes share, at the same addresses."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return super().allocate(nbytes).share_memory_().fill_(POISON)


@dataclass(frozen=True)
class Processes:
    """Runs each launch by ``count`` processes, each of which is one of its programs."""

    count: int

    def __call__(self, launch: Launch) -> None:
        children = []
        for program in range(self.count):
            child = os.fork()
            if child == 0:
                self._be(launch, program)
            children.append(child)
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            raise WrongLaunch(f"{len(failed)} programs failed")

    def _be(self, launch: Launch, program: int) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx = lambda *_: set_index(program, 0, 0)
        builder.set_grid_dim = lambda *_: set_size(self.count, 1, 1)
        time.sleep(HEAD_START_S * program)
        try:
            replace(launch, programs=1)()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)


def launch_a_few(num_programs: int, kernels: Path) -> None:
    """Raises WrongLaunch."""
    generator = torch.Generator().manual_seed(2)
    slots: dict[int, SlotDelta] = mixed_slots(6, IN, PARTS, torch.float32, generator)
    forms = Forms(SMALL_FORM, SMALL_FORM, SMALL_FORM)
    run, queue, module = Processes(num_programs), SharedQueue(CPU), load_kernels(kernels)
    backend = make_lora(fused=True, forms=forms, recorder=run, queue=queue, module=module)
    table = backend.new_table(IN, PARTS, dtype=torch.float32, device=CPU, max_bytes=1 << 30)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    for launch in range(LAUNCHES):
        plan = plan_rows(
            [(1, (Term(launch), Term(4, 0.5))), (3, ()), (18, (Term(2),)), (1, (Term(5),)), (1, (Term(3),))]
        )
        x = torch.randn(plan.num_rows, IN, generator=generator)
        y = torch.randn(plan.num_rows, sum(PARTS), generator=generator).share_memory_()
        expected = expected_output(y, x, plan, slots, PARTS)
        table.add_(y, x, backend.prepare(plan))
        if worst_excess(y, expected, y.dtype) > 1:
            raise WrongLaunch(f"launch {launch}: {worst_excess(y, expected, y.dtype)} times the tolerance")


if __name__ == "__main__":
    answer(launch_a_few)
