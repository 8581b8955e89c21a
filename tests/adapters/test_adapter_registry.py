"""The registry: names, versions and references, in any order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry, LoadTicket
from loraplex.errors import AlreadyExists, InvalidRequest, Mismatch, NotFound
from loraplex.types import AdapterState, Coverage, OnConflict, Residency


def facts(uid: str = "u1") -> AdapterFacts:
    return AdapterFacts(uid, "lora", 8, 100, 200, Coverage({"q_proj": 2}, {"q_proj": 8}))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry(lambda uid: Residency.HOST, Clock())


def loaded(registry: AdapterRegistry, name: str = "fr", uid: str = "u1", *, pinned: bool = False) -> AdapterHandle:
    ticket = registry.begin_load(name, f"/a/{uid}", pinned=pinned, on_conflict=OnConflict.REPLACE)
    return registry.finish_load(ticket, facts(uid)).handle


def test_a_load_is_visible_only_when_finished(registry: AdapterRegistry) -> None:
    ticket = registry.begin_load("fr", "/a/fr", pinned=True)
    assert registry.acquire("fr") is None
    assert registry.get("fr").state is AdapterState.LOADING
    outcome = registry.finish_load(ticket, facts())
    assert outcome.replaced is None
    assert registry.acquire("fr") is outcome.handle
    info = registry.get("fr")
    assert (info.state, info.uid, info.kind, info.source) == (AdapterState.READY, "u1", "lora", "/a/fr")
    assert (info.in_flight, info.generation, info.pinned, info.residency) == (1, 1, True, Residency.HOST)
    assert 1000 < info.loaded_at < info.last_used_at
    assert (info.max_rank, info.num_parameters, info.bytes, info.coverage.sites) == (8, 100, 200, {"q_proj": 2})


def test_a_failed_load_never_existed(registry: AdapterRegistry) -> None:
    info = registry.fail_load(registry.begin_load("fr", "/a/fr"), "broken")
    assert (info.state, info.error) == (AdapterState.FAILED, "broken")
    with pytest.raises(NotFound):
        registry.get("fr")
    assert registry.list() == ()
    assert loaded(registry).generation == 1


def test_conflicts(registry: AdapterRegistry) -> None:
    ticket = registry.begin_load("fr", "/a/first")
    for on_conflict in OnConflict:
        with pytest.raises(AlreadyExists, match="'fr' is being loaded from '/a/first'"):
            registry.begin_load("fr", "/b", on_conflict=on_conflict)
    registry.finish_load(ticket, facts())
    with pytest.raises(AlreadyExists, match="on_conflict=REPLACE"):
        registry.begin_load("fr", "/b")


@pytest.mark.parametrize("name", ["", "../x", "a b", "a\n", "-a", "a" * 129, "é"])
def test_names_are_plain(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        registry.begin_load(name, "/a")
    assert caught.value.field == "name"


def test_running_requests_finish_on_the_version_they_began_with(registry: AdapterRegistry) -> None:
    first = loaded(registry, uid="u1")
    assert registry.acquire("fr") is first
    ticket = registry.begin_load("fr", "/a/2", on_conflict=OnConflict.REPLACE)
    assert registry.acquire("fr") is first
    outcome = registry.finish_load(ticket, facts("u2"))
    assert outcome.replaced is first
    assert first.state is AdapterState.DRAINING
    assert registry.get("fr").generation == 2
    assert registry.acquire("fr") is outcome.handle
    assert registry.states()[AdapterState.DRAINING] == 1
    assert not registry.release(first)
    assert registry.holds("u1")
    assert registry.release(first)
    assert first.state is AdapterState.UNLOADED
    assert not registry.holds("u1")
    assert not registry.release(outcome.handle)


def test_a_failed_replacement_leaves_the_old_version(registry: AdapterRegistry) -> None:
    first = loaded(registry)
    registry.fail_load(registry.begin_load("fr", "/b", on_conflict=OnConflict.REPLACE), "broken")
    assert registry.acquire("fr") is first


def test_an_unused_version_is_gone_at_once(registry: AdapterRegistry) -> None:
    loaded(registry)
    assert registry.unload("fr").state is AdapterState.UNLOADED
    assert not registry.holds("u1")
    with pytest.raises(NotFound):
        registry.unload("fr")


def test_unload_drains(registry: AdapterRegistry) -> None:
    handle = loaded(registry)
    registry.acquire("fr")
    assert registry.unload("fr") is handle
    assert handle.state is AdapterState.DRAINING
    assert registry.unload("fr") is handle
    assert registry.get("fr").state is AdapterState.DRAINING
    with pytest.raises(NotFound, match="'fr' is being unloaded"):
        registry.acquire("fr")
    again = loaded(registry, uid="u2")
    assert registry.get("fr").uid == "u2"
    assert again.generation == 2
    assert registry.release(handle)


def test_pins_and_loads_refuse_unload(registry: AdapterRegistry) -> None:
    loaded(registry, pinned=True)
    assert registry.pins("u1")
    with pytest.raises(Mismatch, match="'fr' is pinned"):
        registry.unload("fr")
    registry.set_pinned("fr", False)
    assert not registry.pins("u1")
    ticket = registry.begin_load("fr", "/b", on_conflict=OnConflict.REPLACE)
    with pytest.raises(Mismatch, match="'fr' is being loaded"):
        registry.unload("fr")
    registry.fail_load(ticket, "x")
    assert registry.unload("fr").state is AdapterState.UNLOADED
    with pytest.raises(NotFound):
        registry.set_pinned("fr", True)


def test_the_nearest_names_are_named(registry: AdapterRegistry) -> None:
    loaded(registry, "french")
    loaded(registry, "sql")
    with pytest.raises(NotFound, match=r"'frnech' is not loaded; did you mean french\?"):
        registry.acquire("frnech")
    with pytest.raises(NotFound, match=r"loaded are french, sql$"):
        registry.acquire("zzz")


def test_several_adapters_are_acquired_together_or_not_at_all(registry: AdapterRegistry) -> None:
    one, two = loaded(registry, "one"), loaded(registry, "two", "u2")
    assert registry.acquire_all(("one", "two", "one")) == (one, two, one)
    assert (one.refs, two.refs) == (2, 1)
    registry.begin_load("three", "/a")
    assert registry.acquire_all(("one", "three")) is None
    with pytest.raises(NotFound, match="'four'"):
        registry.acquire_all(("one", "three", "four"))
    assert (one.refs, two.refs) == (2, 1)


def test_one_content_under_two_names(registry: AdapterRegistry) -> None:
    loaded(registry, "a")
    loaded(registry, "b")
    registry.unload("a")
    assert registry.holds("u1")
    registry.unload("b")
    assert not registry.holds("u1")
    assert [info.name for info in registry.list()] == []


class Life(RuleBasedStateMachine):
    """Load, replace, unload, acquire, release in any order, against a plain model of what users see."""

    names = st.sampled_from(["a", "b", "c"])
    uids = st.sampled_from(["u1", "u2", "u3"])

    def __init__(self) -> None:
        super().__init__()
        self.registry = AdapterRegistry(lambda uid: Residency.HOST, Clock())
        self.tickets: list[LoadTicket] = []
        self.held: list[AdapterHandle] = []
        self.visible: dict[str, AdapterHandle] = {}

    @rule(name=names, on_conflict=st.sampled_from(OnConflict))
    def begin(self, name: str, on_conflict: OnConflict) -> None:
        busy = any(ticket.name == name for ticket in self.tickets)
        if busy or (name in self.visible and on_conflict is OnConflict.FAIL):
            with pytest.raises(AlreadyExists):
                self.registry.begin_load(name, "/s", on_conflict=on_conflict)
        else:
            self.tickets.append(self.registry.begin_load(name, "/s", on_conflict=on_conflict))

    @rule(data=st.data(), uid=uids)
    def finish(self, data: st.DataObject, uid: str) -> None:
        if not self.tickets:
            return
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        if data.draw(st.booleans()):
            self.registry.fail_load(ticket, "x")
            return
        outcome = self.registry.finish_load(ticket, facts(uid))
        assert outcome.replaced is self.visible.get(ticket.name)
        self.visible[ticket.name] = outcome.handle

    @rule(name=names)
    def acquire(self, name: str) -> None:
        if name in self.visible:
            handle = self.registry.acquire(name)
            assert handle is self.visible[name]
            self.held.append(handle)
        elif any(ticket.name == name for ticket in self.tickets):
            assert self.registry.acquire(name) is None
        else:
            with pytest.raises(NotFound):
                self.registry.acquire(name)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.held:
            return
        handle = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        ended = self.registry.release(handle)
        assert ended is (handle not in self.held and handle not in self.visible.values())
        assert (handle.state is AdapterState.UNLOADED) is ended

    @rule(name=names)
    def unload(self, name: str) -> None:
        if any(ticket.name == name for ticket in self.tickets):
            with pytest.raises(Mismatch):
                self.registry.unload(name)
        elif name in self.visible:
            handle = self.visible.pop(name)
            assert self.registry.unload(name) is handle
            assert handle.state is (AdapterState.DRAINING if handle in self.held else AdapterState.UNLOADED)

    @invariant()
    def versions_live_as_long_as_they_are_needed(self) -> None:
        alive = {*self.visible.values(), *self.held}
        for uid in ("u1", "u2", "u3"):
            assert self.registry.holds(uid) is any(handle.uid == uid for handle in alive)
        states = self.registry.states()
        assert states[AdapterState.READY] == len(self.visible)
        assert states[AdapterState.LOADING] == len(self.tickets)
        assert states[AdapterState.DRAINING] == len(alive) - len(self.visible)
        for handle in alive:
            assert handle.refs == self.held.count(handle)
        names = {ticket.name for ticket in self.tickets} | {handle.name for handle in alive}
        assert [info.name for info in self.registry.list()] == sorted(names)

    def teardown(self) -> None:
        for ticket in self.tickets:
            self.registry.fail_load(ticket, "end")
        for name in self.visible:
            self.registry.unload(name)
        for handle in self.held:
            self.registry.release(handle)
        assert self.registry.list() == ()
        assert not any(self.registry.states().values())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
