"""The Triton backends under graphs, in the interpreter: the step is called again in the place of a replay.

That is no capture: what a graph bakes in is ``test_graphs``' business, and a GPU's (``test_gpu_engine``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.types import AdapterRef, OnConflict, Request, StopRule
from loraplex_kernels.backend import choose_attention, choose_lora
from tests.engines import local_engine, make_adapters
from tests.fakes_graphs import RerunCapture
from tests.oracle import Oracle
from tests.tiny import prompt, tiny_checkpoint

NAMES = ("all", "vocabulary", "patterned")
STOP = StopRule(max_tokens=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def triton_runs_here() -> None:
    try:
        choose_lora("triton", torch.device("cpu"))
        choose_attention("triton", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


def test_every_sequence_is_as_alone(tmp_path: Path) -> None:
    """Base-only rows, padding rows, a weighted sum; adapters loaded, replaced and unloaded after the capture. Steps
    overlap as on a GPU."""
    base = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, tmp_path / "adapters")
    capture = RerunCapture()
    engine = local_engine(
        base,
        adapter_dirs=(tmp_path,),
        lora_backend="triton",
        attention_backend="triton",
        graphs="on",
        capture=capture,
        mode="eager",
        max_num_seqs=6,
        max_num_batched_tokens=24,
    )
    oracle = Oracle(base, adapters)
    oracle.add_weighted("sum", {"all": 0.5, "patterned": -2.0})
    for name in NAMES:
        engine.load_adapter(name, str(adapters[name]))
    mixed = (AdapterRef("all", 0.5), AdapterRef("patterned", -2.0))
    asked = {None: (), "vocabulary": (AdapterRef("vocabulary"),), "all": (AdapterRef("all"),), "sum": mixed}
    requests = [
        Request(f"r{index}", prompt(3 + index, seed=index), adapters=refs, stop=STOP)
        for index, refs in enumerate([*asked.values(), ()])
    ]
    got = [generation.token_ids for generation in engine.generate(requests)]
    wanted = zip([*asked, None], requests, strict=True)
    assert got == [oracle.greedy(name, request.prompt_token_ids, 3) for name, request in wanted]
    engine.load_adapter("all", str(adapters["one"]), OnConflict.REPLACE)
    engine.unload_adapter("vocabulary")
    again = Request("again", prompt(4), adapters=(AdapterRef("all"),), stop=STOP)
    assert engine.generate([again])[0].token_ids == oracle.greedy("one", prompt(4), 3)
    assert capture.replayed >= 4
    assert engine.core.model_info.backends == {"lora": "triton", "attention": "triton", "graphs": "on"}
