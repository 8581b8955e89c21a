"""Adapters that are served merged: whole matrices of their own beside the base's, for requests that use them alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraplex.adapters import folding
from loraplex.adapters.delta import SiteDelta
from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.local import LocalEngine
from loraplex.engine.messages import LoadAdapter, SetResidentMode, UnloadAdapter
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, NotFound, OverCapacity, UnsupportedFeature
from loraplex.types import AdapterRef, OnConflict, Residency, UnloadMode
from tests.engines import SIX_ADAPTERS, local_engine, make_adapters
from tests.kind_matrix import KindMatrix
from tests.kind_runs import serve_all
from tests.merged_forms import (
    AUTO,
    MERGED,
    Clock,
    folded_layers,
    is_merged,
    merged,
    request,
    serve,
    tokens_of,
    uids_in_use,
    until,
)
from tests.peft_kinds import SOME_OF_ALL
from tests.ranks import ranked_engine
from tests.tiny import tiny_checkpoint

#: of these there is nothing to merge, or no way
NEVER = ("alora", "ln-tuning", "trainable-tokens")


def check_kinds(engine: LocalEngine, matrix: KindMatrix, *, at_once: int = 8) -> None:
    """Every adapter is merged or refused, and gives PEFT's tokens by itself; and then all of them do in one batch."""
    for name in matrix.names:
        engine.load_adapter(name, str(matrix.adapter(name)))
        if name in NEVER:
            with pytest.raises(UnsupportedFeature, match=r"cannot be merged|nothing to merge"):
                engine.set_resident_mode(name, MERGED)
        else:
            assert engine.set_resident_mode(name, MERGED).merged_bytes > 0
            cases = matrix.cases(name)
            assert is_merged(engine, cases[0].request)
            assert tokens_of(engine.generate([case.request for case in cases])) == [list(c.expected) for c in cases]
    serve_all(engine, matrix, preempted=False, at_once=at_once)
    for name in matrix.names:
        assert engine.unload_adapter(name).merged_bytes == 0
    assert engine.core._desk._bank.stats().host_bytes == 0


#: those whose parts are cut in all ways
CUT = ("lora-lora-bias", "lora-ends", "dora", "bdlora", "ia3-up", "lora-saved-linear", "lora-added-tokens", "alora")
KIND_OPTIONS = {"max_num_batched_tokens": 32, "max_num_seqs": 24, "kv_page_size": 4}


def test_every_kind_is_merged_as_peft_has_it_or_refused(kinds_root: Path) -> None:
    """On biased linears."""
    matrix = KindMatrix(kinds_root, "llama", tied=False, among=SOME_OF_ALL)
    check_kinds(local_engine(matrix.base_dir, adapter_dirs=(matrix.root,), **KIND_OPTIONS), matrix)


def test_each_rank_merges_its_own_part(kinds_root: Path) -> None:
    """Of linears without biases, of which some get one."""
    matrix = KindMatrix(kinds_root, "qwen3", tied=True, among=CUT)
    with ranked_engine(matrix.base_dir, 2, adapter_dirs=(matrix.root,), **KIND_OPTIONS) as ranked:
        check_kinds(ranked.engine, matrix, at_once=6)
        ranked.engine.generate([request()])  # by then all ranks have done what they were told before
        for runner in ranked.runners:
            assert not runner.ops.lora.slots


def test_only_requests_that_use_it_alone_and_whole_are_given_the_merged_form(engine: LocalEngine) -> None:
    [info] = merged(engine, "all")
    assert info.in_flight == 0, "it is tried no longer"
    uid = info.uid
    assert uids_in_use(engine, request("all")) == (uid, f"{uid}+merged")
    half = msgspec.structs.replace(request("all"), adapters=(AdapterRef("all", 0.5),))
    beside_none = msgspec.structs.replace(request("all"), adapters=(AdapterRef("all"), AdapterRef("one", 0.0)))
    assert uids_in_use(engine, half) == (uid,)
    assert uid in uids_in_use(engine, request("all", "one"))
    assert uids_in_use(engine, beside_none) == (uid, f"{uid}+merged")
    [told] = engine.generate([request("all")])
    assert [adapter.uid for adapter in told.adapters] == [uid]


def test_pages_of_the_two_forms_are_never_each_others(engine: LocalEngine) -> None:
    cached = [engine.generate([request("all")])[0].usage.cached_prompt_tokens for _ in range(2)]
    merged(engine, "all")
    cached += [engine.generate([request("all")])[0].usage.cached_prompt_tokens for _ in range(2)]
    assert cached == [0, 8, 0, 8]


def test_who_runs_ends_on_what_it_began_with_and_the_memory_is_free_then(engine: LocalEngine) -> None:
    merged(engine, "all")
    engine.submit(request("all", tokens=12))
    engine.turn()
    (sequence,) = engine.core._scheduler.running
    info = engine.set_resident_mode("all", AUTO)
    assert (info.resident_mode, info.merged_bytes) == (AUTO, 0)
    assert folded_layers(engine) > 0
    assert sequence.uids == (info.uid, f"{info.uid}+merged")
    again = engine.submit(request("all", tokens=12))
    engine.turn()
    assert engine.core._scheduler.running[-1].uids == (info.uid,)
    engine.run_until_idle()
    first, second = list(engine.generations.values())[-2:]
    assert first.token_ids == second.token_ids == engine.generations[again].token_ids
    assert folded_layers(engine) == 0


@pytest.mark.parametrize("mode", [UnloadMode.DRAIN, UnloadMode.ABORT])
def test_it_goes_with_its_adapter(engine: LocalEngine, mode: UnloadMode) -> None:
    merged(engine, "all")
    engine.submit(request("all", tokens=9))
    engine.turn()
    engine.unload_adapter("all", mode)
    assert folded_layers(engine) == 0
    assert not any("+merged" in uid for uid in engine.core._desk._bank.stats().host_uids)


def test_a_new_version_is_merged_as_the_last_one_was(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    merged(engine, "all")
    other = engine.generate([request("attention")])[0].token_ids
    old = engine.get_adapter("all").uid
    engine.submit(request("all", tokens=9))
    engine.turn()
    engine.load_adapter("all", str(adapters["attention"]), OnConflict.REPLACE)
    engine.run_until_idle()
    until(engine, lambda: engine.get_adapter("all").merged_bytes > 0)
    assert is_merged(engine, request("all"))
    assert engine.generate([request("all")])[0].token_ids == other
    assert old + "+merged" not in engine.core._desk._bank.stats().host_uids


def test_one_that_is_loaded_to_be_merged_serves_before_it_is(base: Path, adapters: dict[str, Path]) -> None:
    """As after a restart of the engine."""
    engine = serve(base, {})
    op = engine.begin_op()
    reply = engine.wait(op, LoadAdapter(op, "all", str(adapters["all"]), resident_mode=MERGED))
    assert (reply.adapters[0].resident_mode, reply.adapters[0].merged_bytes) == (MERGED, 0)
    until(engine, lambda: engine.get_adapter("all").merged_bytes > 0)
    assert is_merged(engine, request("all"))


def test_two_names_of_one_content_share_the_form(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    engine.load_adapter("twin", str(adapters["all"]))
    first, second = merged(engine, "all", "twin")
    assert first.merged_bytes == second.merged_bytes
    layers = folded_layers(engine)
    engine.set_resident_mode("all", AUTO)
    assert not is_merged(engine, request("all"))
    assert is_merged(engine, request("twin"))
    assert folded_layers(engine) == layers
    engine.unload_adapter("twin")
    assert folded_layers(engine) == 0


def test_what_does_not_fit_is_refused_in_bytes_and_changes_nothing(base: Path, adapters: dict[str, Path]) -> None:
    engine = serve(base, adapters, adapter_memory=80_000)
    before = engine.core._desk._bank.stats()
    with pytest.raises(OverCapacity, match=r"merged it takes 90112 bytes .* of which 80000 are available"):
        engine.set_resident_mode("all", MERGED)
    assert engine.core._desk._bank.stats() == before
    assert engine.get_adapter("all").resident_mode is AUTO
    merged(engine, "attention")
    with pytest.raises(OverCapacity, match=r"merged it takes 51200 bytes .* of which 47232 are available"):
        engine.set_resident_mode("vocabulary", MERGED)
    assert is_merged(engine, request("attention"))
    assert not is_merged(engine, request("vocabulary"))
    for name in SIX_ADAPTERS:  # room is left for all others in turn
        engine.generate([request(name)])
    assert is_merged(engine, request("attention"))


def test_what_is_refused_or_given_up_leaves_nothing(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["all"], base.parent / "moved", dirs_exist_ok=True)
    engine = serve(base, {**adapters, "moved": base.parent / "moved"})
    with pytest.raises(NotFound, match="'none' is not loaded"):
        engine.set_resident_mode("none", MERGED)
    shutil.copytree(adapters["one"], base.parent / "moved", dirs_exist_ok=True)
    with pytest.raises(Mismatch, match="has changed since it was loaded"):
        engine.set_resident_mode("moved", MERGED)
    shutil.rmtree(base.parent / "moved")
    with pytest.raises(LoraplexError, match="moved"):
        engine.set_resident_mode("moved", MERGED)
    ops = [engine.begin_op() for _ in range(3)]
    engine.core.handle(b"local", SetResidentMode(ops[0], "one", MERGED))
    engine.core.handle(b"local", SetResidentMode(ops[1], "patterned", MERGED))
    with pytest.raises(Mismatch, match="'one': its resident mode was set to auto while it was merged"):
        engine.wait(ops[0], SetResidentMode(engine.begin_op(), "one", AUTO))
    with pytest.raises(Mismatch, match="'patterned': it was unloaded while it was merged"):
        engine.wait(ops[1], UnloadAdapter(ops[2], "patterned"))
    until(engine, lambda: not engine.core._desk.forms._forms)
    assert folded_layers(engine) == 0
    assert not any("+merged" in uid for uid in engine.core._desk._bank.stats().host_uids)


def test_a_form_that_is_not_the_adapter_is_not_served(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SiteDelta.merged

    def flipped(self: SiteDelta, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        pair = self.low_rank
        return right(replace(self, low_rank=None if pair is None else replace(pair, scale=-pair.scale)), weight, bias)

    monkeypatch.setattr(folding.SiteDelta, "merged", flipped)
    with pytest.raises(InvalidAdapter, match="is more than rounding"):
        engine.set_resident_mode("one", MERGED)
    assert folded_layers(engine) == 0
    assert not is_merged(engine, request("one"))


def test_of_a_quantized_base_it_is_the_dequantized_one_with_the_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    wide = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False, **sizes)
    engine = serve(wide, make_adapters(wide, tmp_path / "adapters", ("all", "vocabulary")), quantization="nf4")
    requests = [request(*names, tokens=12) for names in ((), ("all",), ("vocabulary",), ("all", "vocabulary"))]
    expected = tokens_of(engine.generate(requests))
    assert len({tuple(tokens) for tokens in expected}) == 4
    merged(engine, "all", "vocabulary")
    assert tokens_of(engine.generate(requests)) == expected
    assert is_merged(engine, request("all"))


def test_most_of_the_traffic_turns_it_on_and_little_of_it_off(engine: LocalEngine) -> None:
    clock = Clock()
    engine.core._desk.forms._auto = AutoMerge(clock, on=True)

    def serve_for(seconds: float, *names: str) -> None:
        """Ten steps a second of one request for each name."""
        for _ in range(int(seconds * 2)):
            for name in names:
                engine.submit(request(*([name] if name else []), tokens=5))
            while not all(g.over for g in engine.generations.values()):
                engine.turn()
                clock.now += 0.1

    def on() -> list[str]:
        until(engine, lambda: not engine.core._desk.forms._jobs and not engine.core.has_work)
        return [info.name for info in engine.list_adapters() if info.merged_bytes]

    serve_for(3, "all")
    assert on() == [], "a few seconds are no reason yet"
    serve_for(5, "all")
    assert on() == ["all"]
    assert engine.get_adapter("all").resident_mode is AUTO
    assert is_merged(engine, request("all"))
    for _ in range(10):
        serve_for(1, "all")
        serve_for(1, "one")
    assert on() == ["all"], "half of the steps are enough to stay"
    serve_for(10, "all", "one")
    assert on() == [], "beside others it is of no use, however much of the traffic is its own"
    assert folded_layers(engine) == 0


def test_what_its_traffic_is_worth_puts_nobody_out(base: Path, adapters: dict[str, Path]) -> None:
    engine = serve(base, adapters, adapter_memory=120_000)
    clock = Clock()
    engine.core._desk.forms._auto = auto = AutoMerge(clock, on=True)
    uid = engine.get_adapter("all").uid
    monkey = engine.core._scheduler
    assert [engine.get_adapter(name).residency for name in SIX_ADAPTERS] == [Residency.DEVICE] * 6
    engine.submit(request("all", tokens=20))
    engine.turn()
    for _ in range(100):
        clock.now += 0.5
        auto.observe(monkey.running)
    assert auto.hot() == [uid]
    engine.run_until_idle()
    until(engine, lambda: not engine.core.has_work)
    engine.turn()
    until(engine, lambda: not engine.core._desk.forms._jobs)
    assert engine.get_adapter("all").merged_bytes == 0
    assert [engine.get_adapter(name).residency for name in SIX_ADAPTERS] == [Residency.DEVICE] * 6
    assert auto.hot() == [], "not again at once"
