"""The first rank and other machines: who is let in, what each is told, and how an end is seen."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from loraplex.config import Config, EngineConfig, ModelConfig, NodesConfig
from loraplex.engine.ranks import link
from loraplex.engine.ranks.link import Call, Connection, NodeHello, NodeRefused, OtherNodes, Over, RankEnded, answer
from loraplex.engine.ranks.orders import RankStart
from loraplex.errors import GroupLost, InvalidConfig
from loraplex.parallel.rendezvous import Meeting


def config_of(node_rank: int = 0, *, nnodes: int = 2, ranks: int = 4, within_s: float = 10.0, **engine: int) -> Config:
    nodes = NodesConfig(nnodes=nnodes, node_rank=node_rank, rdzv_endpoint="127.0.0.1:1", rdzv_timeout_s=within_s)
    model = ModelConfig(model=f"/models/of-{node_rank}", tensor_parallel_size=ranks)
    return Config(model=model, engine=EngineConfig(**engine), nodes=nodes)  # type: ignore[arg-type]


class World:
    """The first rank's side, gathering in a thread; ``progress`` as it was told."""

    def __init__(self, config: Config) -> None:
        self.progress: list[tuple[int, int]] = []
        self.nodes = OtherNodes(config, "127.0.0.1", lambda _stage, done, total: self.progress.append((done, total)))
        size = config.model.tensor_parallel_size
        self.ranks = {
            rank: self.nodes.rank(RankStart(config, "/m", Meeting("h", 1, rank, size, 1.0), f"o{rank}", "q", "d"))
            for rank in range(config.ranks_here, size)
        }
        self.error: BaseException | None = None
        self.came: list[Connection] = []
        self.thread = threading.Thread(target=self._gather)
        self.thread.start()

    def _gather(self) -> None:
        try:
            self.nodes.gather()
        except BaseException as error:
            self.error = error

    def come(self, config: Config) -> Connection:
        """A machine comes."""
        self.came.append(answer(self.nodes.call, config))
        return self.came[-1]

    def close(self) -> None:
        self.nodes.close(None)
        self.thread.join(20)
        for connection in self.came:
            connection.close()

    def gathered(self) -> None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


@pytest.fixture
def world() -> Iterator[World]:
    with contextlib.closing(World(config_of())) as made:
        yield made


def take(connection: Connection, number: int = 1) -> list[object]:
    got: list[object] = []
    deadline = time.monotonic() + 10
    while len(got) < number and time.monotonic() < deadline:
        received = connection.receive(0.1)
        assert received is not None, got
        got += received
    return got


def closed(connection: Connection) -> bool:
    deadline = time.monotonic() + 10
    while (received := connection.receive(0.1)) is not None:
        assert not received
        assert time.monotonic() < deadline
    return True


def test_a_machine_is_told_what_its_ranks_are(world: World) -> None:
    node = world.come(config_of(1))
    assert [(s.meeting.rank, s.orders) for s in take(node, 2) if isinstance(s, RankStart)] == [(2, "o2"), (3, "o3")]
    world.gathered()
    assert world.progress[0] == (0, 1)
    assert not any(rank.ended() for rank in world.ranks.values())


def test_a_rank_that_ends_there_is_known_here_and_its_neighbour_is_not_blamed(world: World) -> None:
    node = world.come(config_of(1))
    world.gathered()
    node.send(RankEnded(3, "its process ended with exit code -9"))
    deadline = time.monotonic() + 10
    while not world.ranks[3].ended():
        assert time.monotonic() < deadline
    assert world.ranks[3].ended() == "on node 1, its process ended with exit code -9"
    assert world.ranks[2].ended() == ""


def test_a_connection_that_closes_ends_the_ranks_behind_it(world: World) -> None:
    node = world.come(config_of(1))
    world.gathered()
    node.close()
    deadline = time.monotonic() + 10
    while not world.ranks[2].ended():
        assert time.monotonic() < deadline
    assert {rank.ended() for rank in world.ranks.values()} == {"the connection to node 1 of 2 is lost"}


def test_an_ordered_end_is_told_and_another_is_not(world: World) -> None:
    node = world.come(config_of(1))
    world.gathered()
    take(node, 2)
    world.nodes.close(Over(None))
    assert take(node) == [Over(None)]
    assert closed(node)


def test_strangers_are_sent_away_and_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_SPEAK_S", 0.3)
    with contextlib.closing(World(config_of())) as world, contextlib.ExitStack() as strangers:
        call = world.nodes.call
        _silent, loud, long = (
            strangers.enter_context(socket.create_connection((call.host, call.port))) for _ in range(3)
        )
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        long.sendall(b"x" * (1 << 21))
        wrong = answer(Call(call.host, call.port, "guessed"), config_of(1))
        strangers.callback(wrong.close)
        assert closed(wrong)
        assert len(take(world.come(config_of(1)), 2)) == 2
        world.gathered()


@pytest.mark.parametrize("node_rank", [0, 2, 1])
def test_a_rank_that_is_not_to_be_had_is_refused_to_who_asks(node_rank: int) -> None:
    """0 is the first machine, 2 is not one of two; 1 is taken, of three."""
    nnodes = 3 if node_rank == 1 else 2
    with contextlib.closing(World(config_of(nnodes=nnodes, ranks=6))) as world:
        if node_rank == 1:
            take(world.come(config_of(1, nnodes=3, ranks=6)), 2)
        (refusal,) = take(world.come(config_of(node_rank, nnodes=nnodes, ranks=6)))
        assert isinstance(refusal, NodeRefused)
        assert f"node rank {node_rank} of" in refusal.failure.message


def test_other_settings_are_named_on_both_sides(world: World) -> None:
    node = world.come(config_of(1, kv_page_size=32))
    (refusal,) = take(node)
    assert isinstance(refusal, NodeRefused)
    with pytest.raises(InvalidConfig) as caught:
        world.gathered()
    assert str(caught.value) == refusal.failure.message
    assert "engine.kv_page_size is 32 on node 1 and 16 on the first machine" in str(caught.value)


def test_another_version_is_named_before_its_settings_are_looked_at(world: World) -> None:
    call = world.nodes.call
    connection = Connection(socket.create_connection((call.host, call.port)), link.ToNode)
    world.came.append(connection)
    connection.send(NodeHello(call.token, 1, "loraplex 9 on torch 1", {"new": [1, {"deep": True}]}))
    (refusal,) = take(connection)
    assert isinstance(refusal, NodeRefused)
    with pytest.raises(InvalidConfig, match="node 1 runs loraplex 9 on torch 1, the first machine loraplex"):
        world.gathered()


def test_a_machine_that_does_not_come_is_named_with_what_to_do() -> None:
    with contextlib.closing(World(config_of(nnodes=3, ranks=3, within_s=0.5))) as world:
        world.come(config_of(1, nnodes=3, ranks=3))
        with pytest.raises(GroupLost, match=r"node 2 of 3 did not come to .* within 0\.5 s.*--node-rank 2"):
            world.gathered()


def test_what_is_no_message_is_the_end_of_a_connection(world: World) -> None:
    node = world.come(config_of(1))
    world.gathered()
    node._socket.sendall(msgspec.json.encode({"type": "Unheard"}) + b"\n")
    deadline = time.monotonic() + 10
    while not world.ranks[2].ended():
        assert time.monotonic() < deadline
