"""The probe: what an adapter is said to do is what it does, by PEFT; what does nothing, or overflows, is refused."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex.adapters.base_view import view_of
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.adapters.reading.source import AdapterSources
from loraplex.adapters.telling import MAX_TELLING, telling_tokens
from loraplex.config import AdaptersConfig
from loraplex.engine.batch import Ops
from loraplex.engine.probe import Prober
from loraplex.errors import InvalidAdapter
from loraplex.layers.rows import Rows
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex.types import Probe
from loraplex_kernels.attention.cpu import CpuAttention
from loraplex_kernels.lora.cpu import CpuLora
from tests.engines import SIX_ADAPTERS, make_adapters
from tests.made_adapters import DOWN, EMBEDDING, low_rank, made
from tests.oracle import Oracle
from tests.tiny import VOCAB_SIZE, load_tiny, tiny_checkpoint

PLAIN_TOKENS = 8


class Bench:
    """A model to itself, a prober, and the prompts it ran: token ids, and the rows with an adapter."""

    def __init__(self, base: Path, *, dtype: str = "float32") -> None:
        lora, attention = CpuLora(), CpuAttention()
        self.model: BaseModel = load_tiny(base, lora=lora, attention=attention, dtype=dtype)
        self.passes: list[tuple[tuple[int, ...], list[tuple[int, int]]]] = []
        kv = self.model.kv_spec()
        cache = attention.new_cache(
            num_layers=kv.num_layers,
            num_pages=2,
            page_size=8,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        self.ops = Ops(lora, attention, cache, self.model.device)
        self.prober = Prober(self.model, self.ops)
        forward = self.model.forward_in_pieces

        def recorded(batch: ForwardBatch) -> Generator[None, None, torch.Tensor]:
            segments = [(segment.start, segment.stop) for segment in batch.adapters.segments.segments]
            self.passes.append((tuple(batch.token_ids.tolist()), segments))
            return forward(batch)

        self.model.forward_in_pieces = recorded  # type: ignore[method-assign]

    def read(self, path: Path) -> PackedAdapter:
        """An adapter as a server reads it."""
        sources = AdapterSources.from_config(AdaptersConfig(adapter_dirs=(str(path.parent),)))
        found = load_adapter(sources.resolve(str(path)), view_of(self.model), max_bytes=1 << 26)
        return pack_adapter(found, self.model.tables())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    return make_adapters(base, tmp_path_factory.mktemp("probe"))


@pytest.fixture
def bench(base: Path) -> Bench:
    return Bench(base)


def test_it_says_what_peft_computes(bench: Bench, base: Path, adapters: dict[str, Path]) -> None:
    oracle = Oracle(base, adapters)
    for name in SIX_ADAPTERS:
        probe = bench.prober.try_out(bench.read(adapters[name]))
        ids = bench.passes[-1][0]
        with_it = torch.stack([oracle.logits(name, ids[: i + 1], 1)[0] for i in range(len(ids))])
        without = torch.stack([oracle.logits(None, ids[: i + 1], 1)[0] for i in range(len(ids))])
        assert probe.max_change == pytest.approx(float((with_it - without).abs().max()), rel=1e-3)
        assert probe.top_changed == pytest.approx(float((with_it.argmax(1) != without.argmax(1)).float().mean()))
        assert probe.num_tokens == len(ids) >= PLAIN_TOKENS


def test_the_base_answers_the_plain_prompt_once_and_the_slot_is_free_again(
    bench: Bench, adapters: dict[str, Path]
) -> None:
    for name in ("all", "attention", "one"):
        bench.prober.try_out(bench.read(adapters[name]), slot=3)
    assert [bool(segments) for _, segments in bench.passes] == [False, True, True, True]
    assert len({ids for ids, _ in bench.passes}) == 1
    assert all(segments in ([], [(0, PLAIN_TOKENS)]) for _, segments in bench.passes)
    again = Bench.read(bench, adapters["all"])
    assert bench.prober.try_out(again, slot=3) == bench.prober.try_out(again, slot=0)
    with pytest.raises(ValueError, match="slot 3, which holds nothing"):
        bench.prober.probe(3, again.facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_changes_no_bit_is_refused_unless_it_says_so(base: Path, dtype: str) -> None:
    bench = Bench(base, dtype=dtype)
    faint = SiteDelta(LowRank(torch.full((1, 48), 1e-30), torch.full((32, 1), 1e-6), 1.0))
    with pytest.raises(InvalidAdapter, match=rf"the adapter changes nothing: with it \(uid faint\).*{dtype}"):
        bench.prober.try_out(made("faint", {DOWN: faint})(bench.model))
    mild = SiteDelta(LowRank(torch.full((1, 48), 1e-3), torch.full((32, 1), 1.0), 1.0))
    assert bench.prober.try_out(made("mild", {DOWN: mild})(bench.model)).max_change > 0
    nothing = Probe(0.0, 0.0, PLAIN_TOKENS)
    assert bench.prober.try_out(made("identity", {DOWN: faint}, identity=True)(bench.model)) == nothing


def test_one_that_overflows_is_refused_and_leaves_the_others_as_they_were(bench: Bench) -> None:
    good = made("good")(bench.model)
    before = bench.prober.try_out(good)
    huge = SiteDelta(LowRank(torch.full((1, 48), 1e30), torch.full((32, 1), 1e30), 1.0))
    with pytest.raises(InvalidAdapter, match=r"\(uid huge\) turns logits non-finite at 8 of 8 positions"):
        bench.prober.try_out(made("huge", {DOWN: huge})(bench.model))
    assert bench.prober.try_out(good) == before


def test_an_embedding_trained_with_few_tokens_is_shown_by_those(bench: Bench) -> None:
    """PEFT's A of an embedding begins as zeros, and only the columns of tokens that were seen ever change."""
    trained = (7, 90)
    change = low_rank(bench.model, EMBEDDING)
    assert change.low_rank is not None
    a = torch.zeros_like(change.low_rank.a)
    a[:, list(trained)] = change.low_rank.a[:, list(trained)]
    sites = {EMBEDDING: replace(change, low_rank=replace(change.low_rank, a=a))}
    assert telling_tokens(sites, bench.model.sites()) == trained
    packed = made("seen", sites, telling_tokens=trained)(bench.model)
    assert bench.prober.try_out(packed).num_tokens == PLAIN_TOKENS + len(trained)
    assert set(trained) <= set(bench.passes[-1][0])
    with pytest.raises(InvalidAdapter, match="changes nothing"):
        bench.prober.try_out(made("unseen", {EMBEDDING: with_columns(change, 1)})(bench.model))


def with_columns(change: SiteDelta, token: int) -> SiteDelta:
    """All zeros but one token's column, which the plain prompt does not have."""
    assert change.low_rank is not None
    a = torch.zeros_like(change.low_rank.a)
    a[:, token] = 1.0
    return replace(change, low_rank=replace(change.low_rank, a=a))


def test_telling_tokens_are_spread_over_the_rows_and_few(bench: Bench) -> None:
    sites, hidden = bench.model.sites(), bench.model.hidden_size
    many = torch.arange(10, 60)
    found = telling_tokens({EMBEDDING: SiteDelta(rows=Rows(torch.ones(len(many), hidden), many))}, sites)
    assert len(found) == MAX_TELLING
    assert (found[0], found[-1]) == (10, 59)
    wider = SiteDelta(rows=Rows(torch.ones(VOCAB_SIZE + 3, hidden)))
    assert telling_tokens({EMBEDDING: wider}, sites) == (VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2)
    assert telling_tokens({EMBEDDING: SiteDelta(rows=Rows(torch.ones(VOCAB_SIZE, hidden)))}, sites) == ()
    assert telling_tokens({DOWN: low_rank(bench.model, DOWN)}, sites) == ()


def test_an_activated_adapter_is_on_from_its_invocation(bench: Bench) -> None:
    always = bench.prober.try_out(made("a")(bench.model))
    invoked = bench.prober.try_out(made("a", invocation_tokens=(11, 12, 13))(bench.model))
    ids, segments = bench.passes[-1]
    start = ids.index(11)
    assert ids[start : start + 3] == (11, 12, 13)
    assert segments == [(start, len(ids))]
    assert 0 < start < len(ids) - 3
    assert invoked.num_tokens == PLAIN_TOKENS + 3
    assert invoked.max_change > 0
    assert invoked != always


def test_a_prompt_is_no_longer_than_the_model_can(tmp_path: Path) -> None:
    short = Bench(tiny_checkpoint(tmp_path, "llama", max_position_embeddings=8))
    probe = short.prober.try_out(made("a", invocation_tokens=(11, 12))(short.model))
    ids, segments = short.passes[-1]
    assert (probe.num_tokens, len(ids)) == (8, 8)
    assert ids[segments[0][0] :][:2] == (11, 12)
    assert short.prober.try_out(made("a")(short.model)).num_tokens == 8


HEAD = "lm_head"


def wide(bench: Bench, uid: str, *, values: float = 1.0, known: int | None = None) -> PackedAdapter:
    """Two tokens that the base does not know, and maybe one that it does, in embedding and head."""
    ids = [*([] if known is None else [known]), VOCAB_SIZE, VOCAB_SIZE + 1]
    rows = Rows(torch.full((len(ids), bench.model.hidden_size), values), torch.tensor(ids))
    sites = {EMBEDDING: SiteDelta(rows=Rows(rows.values.clamp(max=1.0), rows.indices)), HEAD: SiteDelta(rows=rows)}
    telling = telling_tokens(sites, bench.model.sites())
    return made(uid, sites, vocab_size=VOCAB_SIZE + 2, telling_tokens=telling)(bench.model)


def test_added_tokens_are_run_and_not_compared(bench: Bench) -> None:
    probe = bench.prober.try_out(wide(bench, "added"))
    assert probe.max_change < 1e-5, "to add tokens is a change by itself"
    assert (probe.top_changed, probe.num_tokens) == (0.0, PLAIN_TOKENS + 2)
    assert bench.passes[-1][0][-2:] == (VOCAB_SIZE, VOCAB_SIZE + 1)
    (without, _), (with_it, segments) = bench.passes
    assert without == with_it[:-2], "the base has no row for them"
    assert segments == [(0, PLAIN_TOKENS + 2)]


def test_known_tokens_beside_added_ones_are_compared(bench: Bench) -> None:
    probe = bench.prober.try_out(wide(bench, "both", known=8))
    assert 8 in bench.passes[-1][0][:-2]
    assert (probe.num_tokens, probe.max_change > 0) == (PLAIN_TOKENS + 3, True)


def test_an_added_token_whose_logit_overflows_is_found(bench: Bench) -> None:
    with pytest.raises(InvalidAdapter, match=r"non-finite at \d+ of 10 positions"):
        bench.prober.try_out(wide(bench, "loud", values=3e38))


def test_an_invocation_by_an_added_token_is_run(bench: Bench) -> None:
    adapter = wide(bench, "called")
    invoked = replace(adapter, facts=replace(adapter.facts, invocation_tokens=(5, VOCAB_SIZE, 6)))
    probe = bench.prober.try_out(invoked)
    ids, segments = bench.passes[-1]
    assert ids[segments[0][0] :][:3] == (5, VOCAB_SIZE, 6)
    assert (probe.num_tokens, len(ids)) == (PLAIN_TOKENS + 5, PLAIN_TOKENS + 5)
