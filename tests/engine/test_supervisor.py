"""An engine that dies is started anew with what it had; one that keeps dying, or cannot be started, is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from loraplex.engine import supervisor
from loraplex.engine.client import EngineClient
from loraplex.engine.supervisor import SupervisedEngine
from loraplex.errors import GroupLost, LoraplexError, NotFound
from loraplex.types import AdapterInfo, OnConflict, ResidentMode, UnloadMode
from tests.fakes import FakeEngine


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0.0)


class Engine(FakeEngine):
    """One that may have lost the source of some adapters. ``loaded``: what it was told to load."""

    def __init__(self, lost: Iterable[str] = ()) -> None:
        super().__init__()
        self.lost = set(lost)
        self.loaded: list[tuple[str, str, bool]] = []
        self.to_be_merged: list[str] = []
        self.closed = False

    async def load_adapter(
        self,
        name: str,
        source: str,
        pinned: bool = False,
        on_conflict: OnConflict = OnConflict.FAIL,
        resident_mode: ResidentMode = ResidentMode.AUTO,
    ) -> AdapterInfo:
        self.loaded.append((name, source, pinned))
        self.to_be_merged += [name] if resident_mode is ResidentMode.MERGED else []
        if name in self.lost:
            raise NotFound(f"{source} is gone")
        return await super().load_adapter(name, source, pinned, on_conflict)

    async def close(self) -> None:
        self.closed = True


class World:
    """A supervised engine whose next ones are ``engines``, where an error is a start that fails."""

    def __init__(self, restarts: int, *engines: Engine | LoraplexError) -> None:
        self.first = Engine()
        self._next = list(engines)
        self.events: list[str] = []
        self.engine = SupervisedEngine(self.first, self._start, restarts)  # type: ignore[arg-type]
        self.engine.on_restart(lambda reason: self.events.append(f"down: {reason}"), lambda: self.events.append("up"))
        self.engine.on_death(lambda reason: self.events.append(f"dead: {reason}"))

    async def _start(self) -> EngineClient:
        following = self._next.pop(0)
        if isinstance(following, LoraplexError):
            raise following
        return following  # type: ignore[return-value]

    async def over(self) -> None:
        """The engine serves again, or is given up."""
        while self.engine._revival is not None and not self.engine._revival.done():
            await asyncio.sleep(0)


def run(play: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(play(), 10)

    asyncio.run(bounded())


def test_the_next_engine_has_what_the_last_one_had_at_its_end() -> None:
    async def play() -> None:
        second = Engine()
        world = World(1, second)
        for name in ("kept", "gone", "replaced", "pinned"):
            await world.engine.load_adapter(name, f"/{name}")
        await world.engine.unload_adapter("gone", UnloadMode.DRAIN)
        await world.engine.load_adapter("replaced", "/new", False, OnConflict.REPLACE)
        await world.engine.pin_adapter("pinned", True)
        for name in ("kept", "replaced"):
            await world.engine.set_resident_mode(name, ResidentMode.MERGED)
        await world.engine.set_resident_mode("replaced", ResidentMode.AUTO)
        world.first.die("killed")
        assert world.events == ["down: killed"]
        await world.over()
        assert world.events == ["down: killed", "up"]
        assert sorted(second.loaded) == [
            ("kept", "/kept", False),
            ("pinned", "/pinned", True),
            ("replaced", "/new", False),
        ]
        assert second.to_be_merged == ["kept"]
        assert world.first.closed
        assert not second.closed
        assert world.engine.alive

    run(play)


def test_what_cannot_be_loaded_again_is_missing_and_the_rest_is_served() -> None:
    async def play() -> None:
        world = World(1, Engine(lost=("b",)))
        for name in "abc":
            await world.engine.load_adapter(name, f"/{name}")
        world.first.die("killed")
        await world.over()
        assert [info.name for info in await world.engine.list_adapters()] == ["a", "c"]
        assert world.events[-1] == "up"

    run(play)


def test_a_start_that_fails_is_tried_again() -> None:
    async def play() -> None:
        world = World(3, GroupLost("node 1 of 2 did not come"), GroupLost("nor now"), third := Engine())
        await world.engine.load_adapter("a", "/a")
        world.first.die("killed")
        await world.over()
        assert world.events == ["down: killed", "up"]
        assert third.loaded == [("a", "/a", False)]

    run(play)


def test_starts_that_keep_failing_are_given_up_with_both_reasons() -> None:
    async def play() -> None:
        world = World(2, GroupLost("one"), GroupLost("two"))
        world.first.die("killed")
        await world.over()
        assert world.events == ["down: killed", "dead: killed; then it could not be started anew: two"]

    run(play)


def test_one_death_more_than_allowed_is_for_good() -> None:
    async def play() -> None:
        second = Engine()
        world = World(1, second)
        world.first.die("once")
        await world.over()
        second.die("twice")
        await world.over()
        assert world.events == ["down: once", "up", "dead: twice"]
        assert not world.engine.alive

    run(play)


def test_deaths_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        monkeypatch.setattr(supervisor, "WINDOW_S", 0.0)
        engines = [Engine() for _ in range(3)]
        world = World(1, *engines)
        for dying in (world.first, *engines[:2]):
            dying.die("again")
            await world.over()
        assert world.events == ["down: again", "up"] * 3

    run(play)


def test_one_that_dies_while_it_is_given_its_adapters_is_followed_by_another() -> None:
    async def play() -> None:
        second, third = Engine(), Engine()
        world = World(3, second, third)
        await world.engine.load_adapter("a", "/a")
        load = second.load_adapter

        async def load_and_die(name: str, source: str, *how: Any, **more: Any) -> AdapterInfo:
            second.die("at its load")
            return await load(name, source, *how, **more)

        second.load_adapter = load_and_die  # type: ignore[method-assign]
        world.first.die("killed")
        await world.over()
        assert third.loaded == [("a", "/a", False)]
        assert world.events == ["down: killed", "down: at its load", "up"]

    run(play)


def test_a_close_ends_a_restart() -> None:
    async def play() -> None:
        world = World(3)
        never = asyncio.get_running_loop().create_future()

        async def start() -> EngineClient:
            return await never  # type: ignore[no-any-return]

        world.engine._start = start
        world.first.die("killed")
        await asyncio.sleep(0)
        await world.engine.close()
        assert world.first.closed
        assert world.events == ["down: killed"]

    run(play)
