"""Adapters with rows of their own through a whole engine, mixed with others: each sequence's tokens are PEFT's."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from loraplex.engine import rank as engine_rank
from loraplex.engine.local import LocalEngine
from loraplex.engine.sequence import Batch, Chunk, Origin, Sequence
from loraplex.engine.uses import Uses
from loraplex.types import AdapterRef, OutputOptions, Request, SamplingParams, StopRule
from tests.adapters.peft_saved import SavedCase, lora, make, reloaded
from tests.engine.test_poison import poison_page
from tests.engines import in_random_arrival, local_engine
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.streams import MODES
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import oracle, prompt, tiny_checkpoint

WIDE = V + 3
WIDER = V + 40
MAX_TOKENS = 8


def loud_new_tokens(model: PeftModel) -> None:
    """So that some are drawn."""
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight[V:] *= 8


CASES: dict[str, SavedCase] = {
    "lora": SavedCase(lora(target_modules=["q_proj", "down_proj"])),
    "norms": SavedCase(lora(modules_to_save=["norm", "input_layernorm", "q_norm", "k_norm"])),
    "linears": SavedCase(lora(target_modules=["q_proj", "v_proj"], modules_to_save=["k_proj", "down_proj"])),
    "ends": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": SavedCase(lora(trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [4, 9, 11]})),
    "wide": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"]), vocab_size=WIDE, train=loud_new_tokens),
    "wider": SavedCase(lora(target_modules=["embed_tokens", "lm_head", "up_proj"]), vocab_size=WIDER),
    "wide-dora": SavedCase(lora(target_modules=["embed_tokens", "lm_head"], use_dora=True), vocab_size=WIDE),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Expected:
    """One checkpoint with all adapters, and what PEFT says."""

    def __init__(self, root: Path, arch: str) -> None:
        self.base = tiny_checkpoint(root, arch, tie_word_embeddings=False)
        self.root = root
        self._models: dict[str, PreTrainedModel | PeftModel] = {"": oracle(self.base)}
        self._known: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for name, case in CASES.items():
            make(case, self.base, root / arch / name)
            self._models[name] = reloaded(self.base, root / arch / name, case.vocab_size)

    def path(self, name: str) -> Path:
        return self.root / self.base.name.split("-")[0] / name

    @torch.no_grad()
    def greedy(self, name: str, ids: Seq[int]) -> list[int]:
        key = name, tuple(ids)
        if key not in self._known:
            tokens = list(ids)
            for _ in range(MAX_TOKENS):
                tokens.append(int(self._models[name](torch.tensor([tokens])).logits[0, -1].argmax()))
            self._known[key] = tokens[len(ids) :]
        return self._known[key]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, arch: str) -> Expected:
    torch.set_num_threads(1)
    return Expected(tmp_path_factory.mktemp(f"own-rows-{arch}"), arch)


def requests() -> list[Request]:
    """Of every adapter and the base, with trained and added tokens in their prompts."""
    made = []
    for index, name in enumerate(["", *CASES, "", *CASES]):
        own = {"tokens": (3, 9, 4, 11), "wide": (V, 9, WIDE - 1), "wider": (WIDER - 1, V + 7), "wide-dora": (V + 1,)}
        ids = prompt(4 + 3 * (index % 5), seed=index) + own.get(name, ())
        made.append(asked(index, name, ids))
    return made


def asked(index: int, name: str, ids: tuple[int, ...], **fields: object) -> Request:
    adapters = (AdapterRef(name),) if name else ()
    stop = StopRule(max_tokens=MAX_TOKENS, ignore_eos=True)
    return Request(f"r{index}", ids, adapters=adapters, stop=stop, **fields)  # type: ignore[arg-type]


def serve(expected: Expected, **engine: object) -> LocalEngine:
    settings = {"kv_page_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 12, **engine}
    made = local_engine(expected.base, adapter_dirs=(expected.root,), **settings)
    for name in CASES:
        made.load_adapter(name, str(expected.path(name)))
    return made


def check_all(engine: LocalEngine, expected: Expected) -> None:
    got = in_random_arrival(engine, requests(), random.Random(2), most=3)
    found = {f"{g.request.request_id} {g.request.adapters}": g for g in got}
    assert [g.failure for g in found.values() if g.failure] == []
    wanted = {
        key: expected.greedy(g.request.adapters[0].name if g.request.adapters else "", g.request.prompt_token_ids)
        for key, g in found.items()
    }
    assert {key: g.token_ids for key, g in found.items()} == wanted


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_every_sequence_is_as_alone_with_peft(expected: Expected, mode: str, backend: str) -> None:
    engine = serve(expected, mode=mode, lora_backend=backend)
    check_all(engine, expected)
    tokens = [t for g in engine.generations.values() for t in g.token_ids]
    assert max(tokens) >= V, "no added token was ever drawn"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_on_a_gpu_too(expected: Expected, graphs: str) -> None:
    engine = serve(expected, device="cuda", graphs=graphs)
    check_all(engine, expected)
    for name in CASES:
        engine.unload_adapter(name)
    assert not any(ref.rows.held for ref in engine.core._steps.executor.runner.model.tables().values())


def test_adapters_come_and_go_between_steps(expected: Expected) -> None:
    """Room for a few at a time: slots are given to other adapters, and what a plan meant changes."""
    engine = serve(expected, mode="lazy", adapter_memory=60_000, max_num_seqs=4)
    check_all(engine, expected)
    for name in CASES:
        engine.unload_adapter(name)
    assert not any(ref.rows.held for ref in engine.core._steps.executor.runner.model.tables().values())


def test_a_wide_neighbour_changes_nothing_of_a_base_row(expected: Expected) -> None:
    """Drawn tokens and logprobs, beside adapters whose logits are wider."""
    fields = {
        "sampling": SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, seed=7),
        "output": OutputOptions(logprobs=3, prompt_logprobs=True),
    }
    mine = asked(0, "", prompt(9, seed=3), **fields)
    others = [asked(1, "lora", prompt(9, seed=4)), asked(2, "lora", prompt(7, seed=5))]
    wide = [asked(1, "wide", prompt(9, seed=4)), asked(2, "wider", prompt(7, seed=5))]
    beside_plain = serve(expected).generate([mine, *others])[0]
    beside_wide = serve(expected).generate([mine, *wide])[0]
    assert beside_wide.token_ids == beside_plain.token_ids
    assert beside_wide.logprobs == beside_plain.logprobs
    assert beside_wide.prompt_logprobs == beside_plain.prompt_logprobs


@pytest.mark.parametrize("victim", ["", "norms", "linears", "ends", "tokens", "wide"])
def test_a_poisoned_sequence_fails_alone(expected: Expected, victim: str) -> None:
    """Among neighbours that have own norms, linears, embeddings and heads, as it has itself."""
    engine = serve(expected, max_num_seqs=20, max_num_batched_tokens=200)
    good = [engine.submit(request) for request in requests()]
    bad = engine.submit(asked(99, victim, prompt(13, seed=77)))
    engine.turn()
    pages = next(s.pages for s in engine.core._scheduler.running if s.origin.ticket == bad)
    poison_page(engine, pages[1], math.nan)
    engine.run_until_idle()
    failure = engine.generations[bad].failure
    assert failure is not None
    assert failure.error == "NonFinite"
    for generation in (engine.generations[ticket] for ticket in good):
        name = "".join(ref.name for ref in generation.request.adapters)
        assert generation.token_ids == expected.greedy(name, generation.request.prompt_token_ids)


def test_a_draw_from_more_tokens_overlaps_with_no_step(expected: Expected) -> None:
    executor = serve(expected, mode="eager").core._steps.executor
    narrow, wide = (
        Sequence(Origin(b"", 1), Request("r", prompt(5)), Uses(vocab_size=size), 0, 0.0) for size in (V, WIDE)
    )
    assert executor.overlaps(Batch([Chunk(narrow, 0, 5, sample=True), Chunk(wide, 0, 4, sample=False)]))
    assert not executor.overlaps(Batch([Chunk(narrow, 0, 5, sample=True), Chunk(wide, 0, 5, sample=True)]))


@pytest.mark.parametrize("mode", ["none", "eager"])
def test_steps_with_own_rows_run_without_graphs(expected: Expected, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs serve the steps of the others, whatever rows are loaded."""
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    capture = TapeCapture()
    engine = local_engine(
        expected.base,
        adapter_dirs=(expected.root,),
        capture=capture,
        mode=mode,
        kv_page_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=24,
    )
    names = ["lora", "norms", "ends", "wide"]
    for name in names:
        engine.load_adapter(name, str(expected.path(name)))
    for name in ["", *names]:
        before = capture.replayed
        ids = prompt(6, seed=8)
        done = engine.generate([asked(0, name, ids), asked(1, "lora", ids)])
        assert done[0].token_ids == expected.greedy(name, ids)
        assert done[1].token_ids == expected.greedy("lora", ids)
        assert (capture.replayed > before) == (name in ("", "lora"))
