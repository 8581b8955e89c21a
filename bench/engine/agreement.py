"""Do both sides do the same work? Greedy tokens in float32: each row of ours against PEFT alone with its adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.engine.in_process import EngineSide
from bench.engine.peers import PeftSide
from bench.engine.workload import Job, make_job

NUM_TOKENS = 16
ROWS_PER_ADAPTER = 2


class SidesDisagree(Exception):
    """The two sides do not compute the same thing: there is nothing to compare."""


def check_agreement(model_dir: Path, adapters: dict[str, Path], threads: int, vocab_size: int) -> int:
    """Compare, and return the number of tokens compared.

    Raises SidesDisagree naming the first row and token that differ.
    """
    names = ("", *adapters)
    job = make_job(ROWS_PER_ADAPTER * len(names), names, NUM_TOKENS, vocab_size=vocab_size, seed="agreement")
    ours = EngineSide(model_dir, adapters, "float32", threads).run(job)
    peft = PeftSide(model_dir, adapters, torch.float32)
    for index, row in enumerate(job.rows):
        (theirs,) = peft.run(Job((row,), NUM_TOKENS))
        _compare(f"row {index} ({row.adapter or 'base'})", theirs, ours[index])
    return len(job.rows) * NUM_TOKENS


def check_kinds(model_dir: Path, adapters: dict[str, Path], threads: int, vocab_size: int) -> int:
    """The same for adapters that no single PEFT model holds together: ours mixed in one batch, PEFT's one by one."""
    if not adapters:
        return 0
    job = make_job(len(adapters), tuple(adapters), NUM_TOKENS, vocab_size=vocab_size, seed="kinds")
    ours = EngineSide(model_dir, adapters, "float32", threads).run(job)
    for row, tokens in zip(job.rows, ours, strict=True):
        peft = PeftSide(model_dir, {row.adapter: adapters[row.adapter]}, torch.float32)
        (theirs,) = peft.run_alone(Job((row,), NUM_TOKENS))
        _compare(row.adapter, theirs, tokens)
    return len(job.rows) * NUM_TOKENS


def _compare(what: str, theirs: list[int], ours: list[int]) -> None:
    if theirs != ours:
        at = next(i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
        raise SidesDisagree(f"{what}, token {at}: PEFT has {theirs[at]}, ours {ours[at]} (greedy, float32)")
