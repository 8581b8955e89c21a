"""What a request's adapters come to: sums that are none, tokens that nobody knows and text of another version are
refused, by name, and nothing is held for them."""

from __future__ import annotations

import pytest

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.registry import AdapterRegistry
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.uses import Active, Uses, uses_of
from loraplex.errors import InvalidRequest, Unavailable
from loraplex.types import (
    AdapterRef,
    AdapterState,
    Coverage,
    FinishReason,
    OwnText,
    Request,
    Residency,
    ResolvedAdapter,
    SamplingParams,
    StopRule,
)
from tests.engines import local_engine
from tests.fakes import FAKE_MODEL
from tests.made_adapters import DOWN, loads, made
from tests.tiny import VOCAB_SIZE, prompt, tiny_checkpoint

VOCAB = FAKE_MODEL.vocab_size
DORA, SAVED = "its magnitudes hold for its own sum", "a saved module"


def facts(uid: str, **more: object) -> AdapterFacts:
    return AdapterFacts(uid, "lora", 8, 100, 200, Coverage({}, {}), **more)  # type: ignore[arg-type]


class World:
    """Loaded versions, and requests for them."""

    def __init__(self, **adapters: AdapterFacts) -> None:
        self.registry = AdapterRegistry(lambda uid: Residency.HOST)
        for name, known in adapters.items():
            self.registry.finish_load(self.registry.begin_load(name, f"/a/{name}"), known)

    def uses(
        self,
        *names: str | tuple[str, float],
        ids: tuple[int, ...] = (5, 6),
        stop_ids: tuple[int, ...] = (),
        text: str = "",
    ) -> Uses:
        refs = [AdapterRef(name) if isinstance(name, str) else AdapterRef(*name) for name in names]
        handles = self.registry.acquire_all([ref.name for ref in refs])
        assert handles is not None
        asked = Request("r", ids, tuple(refs), stop=StopRule(stop_token_ids=stop_ids), text_digest=text)
        return uses_of(asked, handles, FAKE_MODEL, self.registry.knowing)


class TestSums:
    def test_a_plain_sum_is_the_adapters_in_order_from_the_first_token_on(self) -> None:
        world = World(a=facts("ua"), b=facts("ub"))
        found = world.uses(("b", -0.5), "a")
        assert found.resolved == (ResolvedAdapter("b", "ub", -0.5), ResolvedAdapter("a", "ua", 1.0))
        assert (found.active, found.vocab_size) == ((Active("ub", -0.5), Active("ua")), VOCAB)
        assert found.eos_token_ids == FAKE_MODEL.eos_token_ids
        assert world.uses() == Uses((), (), VOCAB, FAKE_MODEL.eos_token_ids)

    def test_own_rows_are_those_of_adapters_that_are_on(self) -> None:
        world = World(
            plain=facts("up"),
            owner=facts("uo", own_rows=True),
            sleeper=facts("us", own_rows=True, invocation_tokens=(7, 8)),
        )
        assert not world.uses().own_rows
        assert not world.uses("plain").own_rows
        assert world.uses("plain", "owner").own_rows
        assert not world.uses("plain", ("owner", 0.0)).own_rows
        assert not world.uses("sleeper").own_rows
        assert world.uses("sleeper", ids=(5, 7, 8, 6)).own_rows

    def test_two_that_change_a_site_exclusively_have_no_sum(self) -> None:
        world = World(
            one=facts("u1", exclusive={"q": DORA, "k": DORA, "head": SAVED}),
            two=facts("u2", exclusive={"k": DORA, "q": DORA, "v": DORA, "head": SAVED}),
        )
        with pytest.raises(InvalidRequest) as refused:
            world.uses("one", "two")
        assert refused.value.field == "adapters"
        assert "request 'r': adapters 'one' and 'two' have no sum" in str(refused.value)
        assert f"both have {DORA}, at q and 1 more, and {SAVED}, at head" in str(refused.value)

    def test_exclusive_ones_at_different_sites_and_plain_ones_beside_them_have_one(self) -> None:
        world = World(one=facts("u1", exclusive={"q": DORA}), two=facts("u2", exclusive={"v": DORA}), lora=facts("u3"))
        assert [used.name for used in world.uses("one", ("lora", 0.3), "two").resolved] == ["one", "lora", "two"]

    @pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, 2.0])
    def test_an_exclusive_one_cannot_be_weighted(self, weight: float) -> None:
        world = World(one=facts("u1", exclusive={"q": DORA}))
        with pytest.raises(InvalidRequest, match=rf"'one' has weight {weight:g}, allowed is 1: it has {DORA}, at q$"):
            world.uses(("one", weight))

    def test_too_many_and_the_same_twice(self) -> None:
        world = World(**{f"a{index}": facts(f"u{index}") for index in range(9)})
        with pytest.raises(InvalidRequest, match=r"names 9 adapters \(a0, a1, .*; allowed are 8"):
            world.uses(*(f"a{index}" for index in range(9)))
        with pytest.raises(InvalidRequest, match="each once"):
            world.uses("a1", "a1")


class TestVocabulary:
    def test_the_largest_of_the_requests_adapters_is_the_bound(self) -> None:
        world = World(wide=facts("u1", vocab_size=VOCAB + 3), plain=facts("u2"))
        assert world.uses("plain", "wide", ids=(1, VOCAB + 2), stop_ids=(VOCAB + 2,)).vocab_size == VOCAB + 3
        with pytest.raises(InvalidRequest, match=rf"token id {VOCAB + 3} is outside .* allowed are 0 to {VOCAB + 2}$"):
            world.uses("wide", ids=(VOCAB + 3,))

    @pytest.mark.parametrize(
        ("field", "asked"),
        [
            ("prompt", {"ids": (1, VOCAB, VOCAB + 9)}),
            ("prompt", {"ids": (-1, 3)}),
            ("stop.stop_token_ids", {"stop_ids": (7, VOCAB)}),
        ],
    )
    def test_others_may_not_use_what_an_adapter_added(self, field: str, asked: dict[str, tuple[int, ...]]) -> None:
        world = World(wide=facts("u1", vocab_size=VOCAB + 1), plain=facts("u2"))
        for names in ((), ("plain",)):
            with pytest.raises(InvalidRequest) as refused:
                world.uses(*names, **asked)  # type: ignore[arg-type]
            assert refused.value.field == field
            strange = -1 if -1 in asked.get("ids", ()) else VOCAB
            assert f"{field}: token id {strange} is outside the vocabulary; allowed are 0 to {VOCAB - 1}" in str(
                refused.value
            )
            assert ("adapter 'wide', which this request does not use, knows it" in str(refused.value)) == (
                strange == VOCAB
            )

    def test_different_added_vocabularies_have_no_sum(self) -> None:
        world = World(one=facts("u1", vocab_size=VOCAB + 1), two=facts("u2", vocab_size=VOCAB + 2))
        with pytest.raises(InvalidRequest, match=rf"'one' knows {VOCAB + 1} tokens, 'two' knows {VOCAB + 2} tokens"):
            world.uses("one", "two")


class TestText:
    def test_its_own_end_of_sequence_replaces_that_of_the_model(self) -> None:
        world = World(
            ends=facts("u1", text=OwnText("d", eos_token_ids=(7, VOCAB, VOCAB + 5)), vocab_size=VOCAB + 1),
            silent=facts("u2", text=OwnText("e")),
            never=facts("u3", text=OwnText("f", eos_token_ids=())),
        )
        assert world.uses("ends", text="d").eos_token_ids == (7, VOCAB), "one that cannot be drawn is none"
        assert world.uses("silent", text="e").eos_token_ids == FAKE_MODEL.eos_token_ids
        assert world.uses("never", text="f").eos_token_ids == ()

    def test_text_made_for_another_version_is_to_be_made_again(self) -> None:
        world = World(own=facts("u1", text=OwnText("new")), plain=facts("u2"))
        assert len(world.uses("plain", "own", text="new").resolved) == 2
        for names, text in ((("own",), "old"), (("own",), ""), (("plain",), "old"), ((), "old")):
            with pytest.raises(Unavailable, match="made for another version") as refused:
                world.uses(*names, text=text)
            assert 0 < refused.value.retry_after_s <= 1

    def test_different_texts_have_no_sum(self) -> None:
        world = World(one=facts("u1", text=OwnText("d")), two=facts("u2", text=OwnText("e")))
        with pytest.raises(InvalidRequest, match="'one', 'two' ship different tokenizers"):
            world.uses("one", "two", text="d")
        world = World(one=facts("u1", text=OwnText("d")), two=facts("u2", text=OwnText("d")))
        assert len(world.uses("one", "two", text="d").resolved) == 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    base = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=False)
    adapters = {
        "plain": made("plain"),
        "dora": made("dora", exclusive={DOWN: DORA}),
        "dora-too": made("dora-too", exclusive={DOWN: DORA}),
        "text": made("text", text=OwnText("d", eos_token_ids=(3,))),
        "text-too": made("text-too", text=OwnText("d", eos_token_ids=())),
    }
    engine = local_engine(base, make_load=loads(adapters))
    for name in adapters:
        engine.load_adapter(name, name)
    return engine


class TestEngine:
    """The same through an engine, where what was held for a refused request must be given back."""

    def ask(self, engine: LocalEngine, *names: str, **more: object) -> Generation:
        ids = more.pop("ids", prompt(5))
        stop = more.pop("stop", StopRule(max_tokens=6, ignore_eos=True))
        refs = tuple(AdapterRef(name) for name in names)
        return engine.generate([Request("r", ids, refs, stop=stop, **more)])[0]  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("names", "more", "error"),
        [
            (("plain", "dora", "dora-too"), {}, "InvalidRequest"),
            (("plain", "dora"), {"ids": (1, VOCAB_SIZE)}, "InvalidRequest"),
            ((), {"ids": (VOCAB_SIZE,)}, "InvalidRequest"),
            (("plain",), {"stop": StopRule(stop_token_ids=(VOCAB_SIZE,))}, "InvalidRequest"),
            (("plain", "text"), {"text_digest": "of before"}, "Unavailable"),
            (("plain", "plain"), {}, "InvalidRequest"),
        ],
    )
    def test_nothing_is_held_for_a_refused_request(
        self, engine: LocalEngine, names: tuple[str, ...], more: dict[str, object], error: str
    ) -> None:
        generation = self.ask(engine, *names, **more)
        assert generation.failure is not None
        assert (generation.failure.error, generation.num_endings) == (error, 1)
        assert [info.in_flight for info in engine.list_adapters()] == [0] * 5
        assert engine.core.num_sequences == 0

    def test_a_version_that_only_refused_requests_named_can_go_at_once(self, engine: LocalEngine) -> None:
        self.ask(engine, "dora", "dora-too")
        assert engine.unload_adapter("dora-too").state is AdapterState.UNLOADED
        assert engine.load_adapter("dora-too", "dora-too").state is AdapterState.READY

    def test_each_sequence_ends_by_its_own_tokens(self, engine: LocalEngine) -> None:
        eos = engine.core.model_info.eos_token_ids
        forced = 40  # far more than a random model needs to draw any one token by chance
        rule = StopRule(max_tokens=forced)
        ends = {"plain": eos, "text": (3,), "text-too": ()}
        ended: set[str] = set()
        for seed in range(12):
            for name, ending in ends.items():
                digest = "" if name == "plain" else "d"
                sampling = SamplingParams(temperature=3.0, seed=seed)
                found = self.ask(engine, name, ids=prompt(4, seed), stop=rule, sampling=sampling, text_digest=digest)
                *before, last = found.token_ids
                assert not set(before) & set(ending)
                assert (found.finish is FinishReason.STOP) == (last in ending)
                assert found.finish is FinishReason.STOP or len(found.token_ids) == forced
                ended |= {name} if found.finish is FinishReason.STOP else set()
        assert ended == {"plain", "text"}, "too few tokens were drawn to see an end"

    def test_min_tokens_forbids_a_sequences_own_end(self, engine: LocalEngine) -> None:
        rule = StopRule(max_tokens=60, min_tokens=60)
        sampling = SamplingParams(temperature=3.0, seed=1)
        found = self.ask(engine, "text", stop=rule, sampling=sampling, text_digest="d")
        assert len(found.token_ids) == 60
        assert 3 not in found.token_ids
        assert set(engine.core.model_info.eos_token_ids) & set(found.token_ids), "the model's own end is a token here"

    def test_an_adapter_of_weight_zero_adds_nothing(self, engine: LocalEngine) -> None:
        refs = (AdapterRef("plain", 0.0),)
        weightless = engine.generate([Request("r", prompt(5), refs, stop=StopRule(max_tokens=6, ignore_eos=True))])[0]
        assert weightless.token_ids == self.ask(engine).token_ids
        assert weightless.token_ids != self.ask(engine, "plain").token_ids
