"""The flagship on kernels for GPUs, in Triton's interpreter: a mixed batch's tokens are those of each alone in PEFT."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from loraplex.types import StopRule
from tests.engines import local_engine, make_adapters, mixed_requests
from tests.oracle import Oracle
from tests.tiny import tiny_checkpoint

triton = pytest.importorskip("triton", reason="the package triton is not installed")

NUM_REQUESTS = 9
#: of each: prompts are what most of the forms of a launch come from
MAX_TOKENS = 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine")
@pytest.mark.parametrize("backend", ["triton", "triton-fused"])
def test_every_sequence_is_as_alone(tmp_path: Path, backend: str) -> None:
    base = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, tmp_path / "adapters")
    rule = StopRule(max_tokens=MAX_TOKENS, ignore_eos=True)
    requests = [msgspec.structs.replace(r, stop=rule) for r in mixed_requests(seed=5, count=NUM_REQUESTS)]
    oracle = Oracle(base, adapters)
    engine = local_engine(base, adapter_dirs=(tmp_path,), lora_backend=backend)
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    tickets = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    expected = [
        oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, MAX_TOKENS) for r in requests
    ]
    assert [engine.generations[ticket].token_ids for ticket in tickets] == expected
    assert max(report.adapters for report in engine.reports) >= 4
