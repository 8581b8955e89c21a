"""Submit, cancel, load, replace, unload, lose a front end, crash a step: in any order, each generation ends exactly
once, each operation is answered exactly once, and an idle engine holds nothing."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loraplex.engine import rank as engine_rank
from loraplex.engine.messages import Abort, AdapterChanged, LoadAdapter, Outputs, Reply, Submit, UnloadAdapter
from loraplex.engine.pools import PoolSizes
from loraplex.types import (
    AdapterRef,
    AdapterState,
    OnConflict,
    OutputOptions,
    Request,
    SamplingParams,
    StopRule,
    UnloadMode,
)
from tests.engines import local_engine, make_adapters
from tests.oracle import make_adapter
from tests.streams import MODES, LazyStream
from tests.tiny import prompt, tiny_checkpoint

NAMES = ("a", "b", "c")
FRONTENDS = (b"one", b"two")
#: how requests are sampled, and what they want to know: only the first two let the next step go ahead
KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "drawn": {"sampling": SamplingParams(temperature=1.0, top_p=0.9, seed=1)},
    "penalized": {"sampling": SamplingParams(repetition_penalty=1.2)},
    "explained": {"output": OutputOptions(logprobs=1, prompt_logprobs=True)},
}


#: adapters, prompt tokens, most output tokens, priority, kind
ASKED = st.tuples(
    st.lists(st.sampled_from(["a", "b", "a", "b", "c", "unknown"]), max_size=2),
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(0, 1),
    st.sampled_from(["greedy", "greedy", "drawn", "drawn", "penalized", "explained"]),
)


class EngineMachine(RuleBasedStateMachine):
    """Drives the core through messages alone, with few pages and device room for one or two adapters."""

    mode: str
    arch: str
    root: Path
    sources: list[Path]

    def __init__(self) -> None:
        super().__init__()
        self.core = local_engine(
            tiny_checkpoint(self.root, self.arch, tie_word_embeddings=False),
            adapter_dirs=(self.root,),
            mode=self.mode,
            lora_backend="cpu",
            attention_backend="cpu",
            kv_page_size=4,
            kv_cache_memory=16 * 4 * 2 * 2 * 2 * 8 * 4,
            max_num_batched_tokens=8,
            max_num_seqs=3,
            max_waiting=6,
            adapter_memory=40_000,
        ).core
        self.counter = 0
        self.tickets: dict[tuple[bytes, int], int] = {}  # -> endings
        self.operations: dict[tuple[bytes, int], int] = {}  # -> replies
        self.gone: set[tuple[bytes, int]] = set()
        self.states: Counter[str] = Counter()

    def _next(self) -> int:
        self.counter += 1
        return self.counter

    @initialize()
    def begin_with_two_adapters(self) -> None:
        for name, source in (("a", 0), ("b", 2)):
            self.load(name=name, source=source, replace=False, pinned=False)
        while self.core._desk.loads:
            self.core.turn()
            self._read()

    @rule(frontend=st.sampled_from(FRONTENDS), asked=st.lists(ASKED, min_size=1, max_size=4))
    def submit(self, frontend: bytes, asked: list[tuple[list[str], int, int, int, str]]) -> None:
        for names, tokens, outputs, priority, kind in asked:
            ticket = self._next()
            self.tickets[frontend, ticket] = 0
            request = Request(
                f"r{ticket}",
                prompt(tokens, seed=tokens) if tokens else (),
                adapters=tuple(AdapterRef(name, 0.5) for name in names),
                # half of the vocabulary ends it, so that many end before they are full
                stop=StopRule(max_tokens=outputs, stop_token_ids=() if ticket % 2 else tuple(range(0, 96, 2))),
                priority=priority,
                **KINDS[kind],  # type: ignore[arg-type]
            )
            self.core.handle(frontend, Submit(ticket, request))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        frontend, ticket = data.draw(st.sampled_from(sorted(self.tickets)))
        self.core.handle(frontend, Abort((ticket,)))

    @rule(name=st.sampled_from(NAMES), source=st.integers(0, 4), replace=st.booleans(), pinned=st.booleans())
    def load(self, name: str, source: int, replace: bool, pinned: bool) -> None:
        op = self._next()
        self.operations[FRONTENDS[0], op] = 0
        path = str(self.sources[source]) if source < len(self.sources) else str(self.root / "nowhere")
        conflict = OnConflict.REPLACE if replace else OnConflict.FAIL
        # a pinned adapter would refuse unloads for ever, so only one name is ever pinned
        self.core.handle(FRONTENDS[0], LoadAdapter(op, name, path, pinned and name == "c", conflict))

    @rule(name=st.sampled_from(NAMES), mode=st.sampled_from(UnloadMode))
    def unload(self, name: str, mode: UnloadMode) -> None:
        op = self._next()
        self.operations[FRONTENDS[0], op] = 0
        self.core.handle(FRONTENDS[0], UnloadAdapter(op, name, mode))

    @rule(count=st.integers(1, 12))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.core.turn()
            self._read()

    @rule()
    def crash_a_step(self) -> None:
        executor = self.core._steps.executor
        launch = executor.launch
        executor.launch = lambda batch, previous: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        try:
            self.core.turn()
        finally:
            executor.launch = launch  # type: ignore[method-assign]
        self.core._steps._num_failed = 0
        self._read()

    @precondition(lambda self: self.mode == "lazy")
    @rule()
    def break_a_step(self) -> None:
        """The device fails at work it was given: it shows when somebody waits."""
        stream = self.core._steps.executor.runner.stream
        assert isinstance(stream, LazyStream)
        stream.fail_next = RuntimeError("broken")
        self.core.turn()
        stream.fail_next = None
        self.core._steps._num_failed = 0
        self._read()

    @rule()
    def lose_a_front_end(self) -> None:
        self._read()
        self.core.drop_frontend(FRONTENDS[1])
        self.gone |= {key for key, endings in self.tickets.items() if key[0] == FRONTENDS[1] and not endings}
        self._read()

    def _read(self) -> None:
        to_each, to_all = self.core.take_outputs()
        for message in to_all:
            if isinstance(message, AdapterChanged):
                self.states[message.adapter.state] += 1
        for frontend, messages in to_each.items():
            for message in messages:
                if isinstance(message, Outputs):
                    for event in message.events:
                        assert not self.tickets[frontend, event.ticket], "an event after the end"
                        self.tickets[frontend, event.ticket] += event.terminal
                elif isinstance(message, Reply):
                    self.operations[frontend, message.op] += 1

    def teardown(self) -> None:
        deadline = time.monotonic() + 20
        desk = self.core._desk
        while self.core.has_work or desk.loads or desk.holds.num_parked or not all(self.operations.values()):
            assert time.monotonic() < deadline, "it never came to rest"
            self.core.turn()
            self._read()
            if not self.core.has_work:
                time.sleep(0.001)
        self._read()
        assert {key for key, endings in self.tickets.items() if endings != 1} <= self.gone
        assert set(self.operations.values()) <= {1}
        assert self.core.num_sequences == 0
        scheduler = self.core._scheduler
        assert scheduler.pages.num_held == 0
        assert scheduler.states is None or scheduler.states.slots.num_held == 0
        assert desk.holds._held == {}
        assert desk.versions._unloads == []
        assert not desk.versions._claims
        bank, registry = desk._bank, desk._registry
        assert all(entry.users == 0 for entry in bank._entries.values())
        assert set(bank._entries) == {info.uid for info in registry.list()}
        assert all(info.state is AdapterState.READY and not info.in_flight for info in registry.list())
        assert self.states[AdapterState.READY] + self.states[AdapterState.FAILED] == self.states[AdapterState.LOADING]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("arch", "mode"), [*(("llama", mode) for mode in MODES), ("bamba", "lazy")])
def test_any_order_ends_everything_once(arch: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if arch == "bamba":
        monkeypatch.setattr(engine_rank, "pool_sizes", lambda *_: PoolSizes(num_pages=16, num_slots=5))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = tiny_checkpoint(root, arch, tie_word_embeddings=False)
        EngineMachine.mode, EngineMachine.arch, EngineMachine.root = mode, arch, root
        EngineMachine.sources = list(make_adapters(base, root / "adapters", ("all", "stabilized", "one")).values())
        EngineMachine.sources.append(
            make_adapter(  # the prompts that hold token 88 invoke it, two of five
                base,
                root / "adapters" / "activated",
                seed=5,
                target_modules=["q_proj", "v_proj"],
                alora_invocation_tokens=[88],
                task_type="CAUSAL_LM",
            )
        )
        case = EngineMachine.TestCase("runTest")
        case.settings = settings(  # type: ignore[attr-defined]
            max_examples=40 if arch == "llama" else 15,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        case.runTest()
