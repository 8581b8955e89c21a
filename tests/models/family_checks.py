"""What every family is held to: prompts, chunks and decodes against transformers, packed sequences against each alone;
and a model cut over ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from loraplex.config import ModelConfig
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.loader import load_model, plan_model
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora.reference import ReferenceLora
from tests.ranks import Meeting
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt

#: float32 rounding over the layers; a flipped sign or a shifted position gives differences of order 1
TOLERANCE: Final = {"rtol": 1e-4, "atol": 1e-4}


@torch.inference_mode()
def check_prompt_chunks_and_decodes(checkpoint: Path) -> None:
    """A prompt in one piece, and in chunks and decodes, has the logits of transformers."""
    model, ids = load_tiny(checkpoint), prompt(23)
    expected = oracle(checkpoint)(torch.tensor([ids])).logits[0]
    runner = PackedRunner(model)
    whole = runner.step([Chunk("whole", ids)])[0]
    torch.testing.assert_close(whole, expected, **TOLERANCE)
    assert whole.argmax(-1).tolist() == expected.argmax(-1).tolist()

    pieces = [ids[:7], ids[7:8], ids[8:18], *([token] for token in ids[18:])]
    rows = torch.cat([runner.step([Chunk("chunked", piece)])[0] for piece in pieces])
    torch.testing.assert_close(rows, expected, **TOLERANCE)


@torch.inference_mode()
def check_packed_as_alone(checkpoint: Path) -> None:
    """Prompts of several lengths, then one step of decodes and a prefill together."""
    model = load_tiny(checkpoint)
    prompts = {f"s{i}": prompt(length, seed=i) for i, length in enumerate((3, 17, 1, 9))}
    packed = PackedRunner(model)
    packed.step([Chunk(name, ids[:-1]) for name, ids in prompts.items() if len(ids) > 1])
    mixed = packed.step([Chunk(name, ids[-1:]) for name, ids in prompts.items()] + [Chunk("late", prompt(6, seed=9))])
    for logits, ids in zip(mixed, list(prompts.values()), strict=False):
        alone = PackedRunner(model).step([Chunk("alone", ids)])[0]
        torch.testing.assert_close(logits[-1], alone[-1], **TOLERANCE)


Prepare = Callable[[BaseModel, LoraBackend, int], None]
"""Called with each rank's model, its low-rank backend and its number, before the first step."""


def on_ranks(
    checkpoint: Path,
    size: int,
    steps: Sequence[Sequence[Chunk]],
    prepare: Prepare = lambda model, lora, rank: None,
) -> list[list[torch.Tensor]]:
    """What every rank of a group of threads gives for the steps, all rows of each."""
    meeting = Meeting(size)
    found: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def run(rank: int) -> None:
        plan = plan_model(checkpoint, ModelConfig(model=str(checkpoint), device="cpu", dtype="float32"))
        lora = ReferenceLora()
        runtime = Runtime(lora, ReferenceAttention(), 1 << 24, meeting.member(rank))
        try:
            model = load_model(plan, runtime, lambda done, total: None)
            prepare(model, lora, rank)
            runner = PackedRunner(model, lora=lora)
            found[rank] = [torch.cat(runner.step(step)) for step in steps]
        except BaseException:
            meeting.give_up()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found), "a rank failed"
    return found
