"""A tied base: adapters that save, train, resize or tie its two ends, all in one engine, each as alone with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.types import AdapterRef, Request, StopRule
from tests.adapters.peft_saved import SavedCase, make, reloaded
from tests.adapters.test_saved import BOTH, TIED
from tests.engines import local_engine
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import oracle, prompt, tiny_checkpoint

MAX_TOKENS = 8
OF_BOTH = (
    "embedding",
    "head",
    "embedding, tied again",
    "other tokens of both ends",
    "tokens of the head",
    "tokens under an adapted head",
    "embedding saved, head adapted",
    "rows of a linear",
    "a layer",
    "wide embedding, tied again",
    "wide, untrained",
    "wide dora ends",
    "wide tuned ends",
    "wide tokens of both ends",
)
CASES: dict[str, SavedCase] = {
    f"a{index}": case for index, case in enumerate([*TIED.values(), *(BOTH[name] for name in OF_BOTH)])
}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_all_at_once_are_as_alone_with_peft(tmp_path: Path, arch: str) -> None:
    torch.set_num_threads(1)
    checkpoint = tiny_checkpoint(tmp_path, arch, tie_word_embeddings=True)
    for name, case in CASES.items():
        make(case, checkpoint, tmp_path / name)
    settings = {"kv_page_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 12}
    engine = local_engine(checkpoint, adapter_dirs=(tmp_path,), **settings)
    for name in CASES:
        engine.load_adapter(name, str(tmp_path / name))
    requests = [asked(index, name) for index, name in enumerate(["", *CASES])]
    tickets = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    found = [engine.generations[ticket] for ticket in tickets]
    assert [generation.failure for generation in found if generation.failure] == []
    expected = {request.request_id: greedy(checkpoint, tmp_path, request) for request in requests}
    assert {generation.request.request_id: list(generation.token_ids) for generation in found} == expected
    untouched = greedy(checkpoint, tmp_path, asked(0, ""))
    of_same_prompt = [expected[f"r{index}"] for index, case in enumerate(CASES.values(), 1) if not case.vocab_size]
    assert sum(tokens != untouched for tokens in of_same_prompt) > len(of_same_prompt) // 2, (
        "they hardly change a thing"
    )


def asked(index: int, name: str) -> Request:
    """The same prompt for all, with an added token for who knows any."""
    wide = bool(name) and bool(CASES[name].vocab_size)
    ids = prompt(9, seed=3) + ((V + 1,) if wide else (3,))
    adapters = (AdapterRef(name),) if name else ()
    return Request(f"r{index}", ids, adapters=adapters, stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True))


@torch.no_grad()
def greedy(checkpoint: Path, root: Path, request: Request) -> list[int]:
    """What transformers and PEFT answer to it alone."""
    name = request.adapters[0].name if request.adapters else ""
    model = reloaded(checkpoint, root / name, CASES[name].vocab_size) if name else oracle(checkpoint)
    tokens = list(request.prompt_token_ids)
    for _ in range(MAX_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(request.prompt_token_ids) :]
