"""Activated LoRA through the engine: the base before the invocation, the adapter after it, in any mix, token for token
what PEFT gives (float32); and the pages before an invocation are the base's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loraplex.engine import rank as engine_rank
from loraplex.engine.local import Generation, LocalEngine
from loraplex.types import AdapterRef, OutputOptions, Request, StopRule
from tests.alora_oracle import AloraOracle
from tests.engines import in_random_arrival, local_engine
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.oracle import ALL_LINEAR, make_adapter
from tests.streams import MODES
from tests.tiny import prompt, tiny_checkpoint

MAX_TOKENS = 8
#: what invokes each; ``both`` begins with what invokes ``short``
INVOCATIONS = {"short": (7,), "long": (11, 12, 13, 14, 15), "both": (7, 8)}
ADAPTERS: dict[str, dict[str, object]] = {
    "short": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "long": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "lm_head"]},
    "both": {"r": 3, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "use_rslora": True},
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
}
#: the adapters of the mixed requests, and where else they come in: several have each its own start
SUMS: tuple[dict[str, float], ...] = (
    {},
    {"short": 1.0},
    {"long": 1.0},
    {"both": 1.0},
    {"plain": 1.0},
    {"short": 0.5},
    {"short": 0.7, "long": -0.5},
    {"plain": 0.6, "both": 0.8},
    {"long": 1.0, "plain": 0.0},
    {"both": 0.5, "plain": 0.5, "short": 0.5, "long": 0.5},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activated")


def adapters_of(root: Path, base: Path) -> dict[str, Path]:
    made = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        made[name] = root / f"{base.name}-adapters" / name
        if not made[name].exists():
            tokens = list(INVOCATIONS[name]) if name in INVOCATIONS else None
            make_adapter(base, made[name], seed=seed, alora_invocation_tokens=tokens, task_type="CAUSAL_LM", **config)
    return made


def loaded(root: Path, base: Path, **engine: object) -> LocalEngine:
    made = local_engine(base, adapter_dirs=(root,), **engine)  # type: ignore[arg-type]
    for name, path in adapters_of(root, base).items():
        info = made.load_adapter(name, str(path))
        assert info.invocation_tokens == INVOCATIONS.get(name, ())
    return made


def asked(tokens: tuple[int, ...], weights: dict[str, float], **fields: object) -> Request:
    return Request(
        f"r{len(tokens)}",
        tokens,
        adapters=tuple(AdapterRef(*item) for item in weights.items()),
        stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True),
        **fields,  # type: ignore[arg-type]
    )


def mixed(seed: int) -> list[Request]:
    """Prompts in which invocations stand anywhere: at both ends, twice, cut short, not at all."""
    rng = random.Random(seed)
    requests = []
    for index in range(28):
        tokens = list(prompt(30, seed=77) if rng.random() < 0.6 else prompt(rng.randint(1, 30), seed=index))
        tokens += prompt(rng.randint(0, 12), seed=1000 + index)
        for _ in range(rng.randint(0, 3)):
            invocation = rng.choice(list(INVOCATIONS.values()))
            place = rng.choice((0, len(tokens), rng.randint(0, len(tokens))))
            tokens[place:place] = invocation[: rng.choice((len(invocation), len(invocation), 2))]
        requests.append(asked(tuple(tokens), SUMS[index % len(SUMS)]))
    return requests


def expected_of(root: Path, base: Path, requests: list[Request]) -> list[list[int]]:
    oracle = AloraOracle(base, adapters_of(root, base))
    return [
        oracle.greedy({ref.name: ref.weight for ref in r.adapters}, r.prompt_token_ids, MAX_TOKENS) for r in requests
    ]


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    """Family -> what PEFT answers to the mixed requests, found when it is asked for."""
    return {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("arch", "backend"), [("llama", "cpu"), ("llama", "reference"), ("qwen3", "cpu")])
def test_every_sequence_is_as_alone(
    root: Path, answers: dict[str, list[list[int]]], arch: str, backend: str, mode: str
) -> None:
    base = tiny_checkpoint(root, arch, tie_word_embeddings=False)
    requests = mixed(seed=len(arch))
    if arch not in answers:
        answers[arch] = expected_of(root, base, requests)
    engine = loaded(
        root,
        base,
        mode=mode,
        lora_backend=backend,
        attention_backend=backend,
        kv_page_size=4,
        kv_cache_memory=40 * 4 * 2 * 2 * 2 * 8 * 4,  # 40 pages: too few for all, so some are preempted
        max_num_batched_tokens=24,
        max_num_seqs=12,
    )
    got = in_random_arrival(engine, requests, random.Random(0), most=2)
    assert [g.token_ids for g in got] == answers[arch]
    # what the run was meant to exercise did happen
    assert engine.reports[-1].preemptions > 0
    assert sum(g.usage.cached_prompt_tokens for g in got if g.adapters and g.adapters[0].name in INVOCATIONS) > 0
    assert {a.invoked for g in got for a in g.adapters if a.name in INVOCATIONS} == {True, False}
    assert {a.invoked for g in got for a in g.adapters if a.name == "plain"} == {True}
    assert engine.core.num_sequences == 0
    assert engine.reports[-1].kv_pages_used == 0


def test_every_sequence_is_as_alone_under_graphs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    capture, requests = TapeCapture(), [request for request in mixed(seed=2) if len(request.adapters) < 2]
    settings = {"kv_page_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    engine = loaded(root, base, capture=capture, mode="eager", **settings)
    assert [g.token_ids for g in in_random_arrival(engine, requests, random.Random(0), most=2)] == expected_of(
        root, base, requests
    )
    assert capture.replayed > 10


@pytest.mark.parametrize("name", list(INVOCATIONS))
def test_the_tokens_are_those_of_pefts_generate(root: Path, name: str) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    oracle = AloraOracle(base, adapters_of(root, base))
    engine = loaded(root, base, max_num_batched_tokens=16, max_num_seqs=4)
    invocation = INVOCATIONS[name]
    prompts = [
        invocation,
        prompt(20, seed=1) + invocation,
        prompt(9, seed=2) + invocation + prompt(13, seed=3) + invocation + prompt(5, seed=4),
        invocation + prompt(11, seed=5),
    ]
    expected = [oracle.generated(name, tokens, MAX_TOKENS) for tokens in prompts]
    assert expected == [oracle.greedy({name: 1.0}, tokens, MAX_TOKENS) for tokens in prompts]
    got = engine.generate(asked(tokens, {name: 1.0}) for tokens in prompts)
    assert [g.token_ids for g in got] == expected
    without = engine.generate(asked(tokens, {}) for tokens in prompts)
    assert all(g.token_ids != w.token_ids for g, w in zip(got, without, strict=True)), "it changes nothing"


def test_without_its_invocation_the_base_answers_and_the_answer_says_so(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    engine = loaded(root, base, adapter_memory=40_000)
    tokens = prompt(14, seed=9) + INVOCATIONS["long"][:4]
    want = engine.generate([asked(tokens, {})])[0].token_ids
    for weights in ({"long": 1.0}, {"long": 0.5, "short": 1.0}):
        got = engine.generate([asked(tokens, weights)])[0]
        assert got.token_ids == want
        assert [(a.name, a.invoked) for a in got.adapters] == [(name, False) for name in weights]
    got = engine.generate([asked(tokens, {"long": 1.0, "plain": 1.0})])[0]
    assert [a.invoked for a in got.adapters] == [False, True]
    assert got.token_ids == engine.generate([asked(tokens, {"plain": 1.0})])[0].token_ids != want


def test_prompt_logprobs_follow_each_position(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    oracle = AloraOracle(base, adapters_of(root, base))
    engine = loaded(root, base, max_num_batched_tokens=9, max_num_seqs=4)
    tokens = prompt(12, seed=1) + INVOCATIONS["long"] + prompt(7, seed=2) + INVOCATIONS["both"] + prompt(3, seed=3)
    for weights in ({"long": 1.0}, {"long": 0.5, "both": 1.0}):
        want = oracle.prompt_logprobs(weights, tokens)
        plain = engine.generate([asked(tokens, {}, output=OutputOptions(prompt_logprobs=True))])[0]
        got = engine.generate([asked(tokens, weights, output=OutputOptions(prompt_logprobs=True))])[0]
        values = [item.logprob for item in got.prompt_logprobs]
        assert values == pytest.approx(want, abs=2e-5)
        before = 12 - 1  # the first invocation token is still foretold by the base
        assert values[: before + 1] == [item.logprob for item in plain.prompt_logprobs[: before + 1]]
        assert values[before + 1] != pytest.approx(plain.prompt_logprobs[before + 1].logprob, abs=1e-3)


def test_pages_before_the_invocation_are_shared_and_the_first_token_comes_sooner(root: Path) -> None:
    """Two activated adapters and the base over one long document, one after the other."""
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False, hidden_size=128, max_position_embeddings=2048)
    engine = loaded(root, base, kv_page_size=16, kv_cache_memory=1 << 24, max_num_batched_tokens=256)
    document = prompt(1601, seed=3)
    engine.generate([asked(prompt(1601, seed=4), {})])  # warm

    def ask(tokens: tuple[int, ...], weights: dict[str, float]) -> tuple[Generation, int]:
        engine.reports.clear()
        got = engine.generate([asked(tokens, weights)])[0]
        return got, sum(report.prefill_tokens for report in engine.reports)

    first, computed = ask((*document, 21, 22), {})
    assert (first.usage.cached_prompt_tokens, computed) == (0, 1603)
    times = {"base, cold": first.usage.ttft_s}
    for name in ("long", "both"):
        got, computed = ask(document + INVOCATIONS[name], {name: 1.0})
        assert got.usage.cached_prompt_tokens == 1600
        assert computed == 1 + len(INVOCATIONS[name])
        times[f"{name}, after the base"] = got.usage.ttft_s
    got, computed = ask(document + INVOCATIONS["short"], {"plain": 1.0})
    assert (got.usage.cached_prompt_tokens, computed) == (0, 1602), "a plain LoRA shares nothing"
    times["plain LoRA"] = got.usage.ttft_s
    # and the other way round: the base finds what an activated adapter computed
    other = prompt(1601, seed=5)
    got, computed = ask(other + INVOCATIONS["long"], {"long": 1.0})
    assert (got.usage.cached_prompt_tokens, computed) == (0, 1606)
    got, computed = ask((*other, 21), {})
    assert (got.usage.cached_prompt_tokens, computed) == (1600, 2)
    # a second turn: what the base generated belongs to the base, what the adapter did is its own
    talk = (*document, 21, 22, *first.token_ids, *prompt(30, seed=6))
    ask(talk, {})
    got, _ = ask(talk + INVOCATIONS["both"], {"both": 1.0})
    assert got.usage.cached_prompt_tokens == len(talk) // 16 * 16
    print("\ntime to first token: " + ", ".join(f"{name} {time * 1000:.1f} ms" for name, time in times.items()))
