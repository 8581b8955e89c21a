"""The first rank and others that end, hang or talk nonsense: each is named, and none is waited for without end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from loraplex.engine.messages import Failure
from loraplex.engine.pools import PoolSizes
from loraplex.engine.ranks.leader import Leader, Line
from loraplex.engine.ranks.link import Over
from loraplex.engine.ranks.orders import (
    AskBias,
    Beat,
    End,
    Failed,
    Kept,
    Loaded,
    Question,
    Refused,
    Serve,
    Serving,
    decode_order,
    encode,
)
from loraplex.errors import GroupLost, InvalidModel
from loraplex.parallel.group import solo


class FakePeer:
    """A rank that ends when it is told to."""

    def __init__(self) -> None:
        self.reason = ""

    def ended(self) -> str:
        return self.reason

    def close(self) -> None:
        self.reason = self.reason or "closed"

    def kill(self) -> None:
        self.reason = self.reason or "killed"


class FakeMachines:
    """Other machines, and what they are told at the end."""

    def __init__(self) -> None:
        self.told: list[Over | None] = []

    def gather(self) -> None:
        return None

    def close(self, over: Over | None) -> None:
        self.told.append(over)


class World:
    """A leader of two other ranks, whose far ends the test holds. ``now`` is its clock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.now = 0.0
        self.tick = 0.25
        self.peers = [FakePeer(), FakePeer()]
        self.far: list[zmq.Socket[bytes]] = []
        lines = []
        for rank, peer in enumerate(self.peers, start=1):
            near, far = (context.socket(zmq.PAIR) for _ in range(2))
            near.bind(f"inproc://orders-{rank}")
            far.connect(f"inproc://orders-{rank}")
            self.far.append(far)
            lines.append(Line(rank, peer, near, near))
        self.machines = FakeMachines()
        self.leader = Leader(lines, lambda device: solo(), patience_s=10.0, machines=self.machines, clock=self.clock)

    def clock(self) -> float:
        self.now += self.tick
        return self.now


def _check_often(leader: Leader) -> None:
    for _ in range(100):
        leader.check()


@pytest.fixture
def world() -> Iterator[World]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = World(context)
    yield made
    if not made.machines.told:
        made.leader.close()
    context.destroy(linger=0)


def test_all_agree_on_what_each_has_room_for(world: World) -> None:
    for far, sizes in zip(world.far, (PoolSizes(70, 5), PoolSizes(50, 7)), strict=True):
        far.send(encode(Loaded(sizes, 1000)))
        far.send(encode(Serving()))
    assert world.leader.agree(PoolSizes(60, 6)) == PoolSizes(50, 5)
    assert world.leader.weight_bytes == 2000
    world.leader.await_serving()
    assert [decode_order(far.recv()) for far in world.far] == [Serve(PoolSizes(50, 5))] * 2


def test_a_rank_that_cannot_start_says_why(world: World) -> None:
    world.far[0].send(encode(Loaded(PoolSizes(70), 1000)))
    world.far[1].send(encode(Failed(Failure.of(InvalidModel("a tensor is missing")))))
    world.peers[1].reason = "its process ended with exit code 1"
    with pytest.raises(InvalidModel, match="a tensor is missing"):
        world.leader.agree(PoolSizes(60))


def test_a_rank_that_ends_while_it_is_waited_for_is_named(world: World) -> None:
    world.far[0].send(encode(Loaded(PoolSizes(70), 1000)))
    world.peers[1].reason = "its process ended with exit code -9"
    with pytest.raises(GroupLost, match=r"rank 2 of 3 ended: its process ended with exit code -9"):
        world.leader.agree(PoolSizes(60))


def test_a_rank_that_does_not_begin_is_named(world: World) -> None:
    world.tick = 10.0
    with pytest.raises(GroupLost, match="rank 1 of 3 did not begin within 120 s"):
        world.leader.join(None)  # type: ignore[arg-type]


def test_a_rank_that_hangs_while_nothing_runs_is_noticed(world: World) -> None:
    for _ in range(8):
        world.leader.check()
    assert [decode_order(far.recv()) for far in world.far] == [Beat(), Beat()]
    world.far[0].send(encode(Beat()))
    with pytest.raises(GroupLost, match=r"rank 2 of 3 has said nothing for 1[0-9] s"):
        _check_often(world.leader)


def test_ranks_that_answer_are_left_in_peace(world: World) -> None:
    for _ in range(400):
        world.leader.check()
        for far in world.far:
            while far.poll(0):
                far.send(far.recv())


def test_what_is_no_answer_ends_the_group(world: World) -> None:
    world.far[0].send(b"\xff\xff")
    with pytest.raises(GroupLost, match="rank 1 of 3 sent what is no answer"):
        world.leader.check()


def test_who_was_lost_is_named_with_the_failed_step(world: World) -> None:
    world.peers[0].reason = "its process ended with exit code -11"
    lost = world.leader.blame(GroupLost("connection reset"))
    assert str(lost) == "connection reset; rank 1: its process ended with exit code -11"
    assert "a step failed: ZeroDivisionError" in str(world.leader.blame(ZeroDivisionError("division by zero")))


def test_what_cannot_be_said_to_a_rank_ends_the_group_and_waits_for_nobody(world: World) -> None:
    """A socket whose far end is gone takes no frame, and would keep whoever sends."""
    world.far[1].disconnect("inproc://orders-2")
    world.peers[1].reason = "the connection to node 1 of 2 is lost"
    with pytest.raises(GroupLost, match=r"rank 2 of 3 ended: the connection to node 1 of 2 is lost"):
        world.leader.tell(Beat())
    world.leader.close(for_good=False)
    assert [decode_order(world.far[0].recv()) for _ in range(2)] == [Beat(), End()]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidModel("a tensor is missing"), Over(Failure("InvalidModel", "a tensor is missing"))),
        (GroupLost("node 1 is gone"), None),
        (KeyError("ours"), None),
    ],
)
def test_machines_wait_where_another_start_may_do(world: World, error: Exception, told: Over | None) -> None:
    world.leader.abandon(error)
    assert world.machines.told == [told]
    assert {peer.reason for peer in world.peers} == {"killed"}


@pytest.mark.parametrize(("for_good", "told"), [(True, Over(None)), (False, None)])
def test_machines_are_told_of_an_end_that_is_for_good(world: World, for_good: bool, told: Over | None) -> None:
    world.leader.close(for_good=for_good)
    assert world.machines.told == [told]
    assert [decode_order(far.recv()) for far in world.far] == [End(), End()]


def test_a_question_that_cannot_be_made_leaves_no_reply_for_the_next(world: World) -> None:
    """What one rank is asked may be found wanting when another is at work on its own already."""

    def questions() -> Iterator[tuple[int, Question]]:
        yield 1, AskBias("of the first")
        raise InvalidModel("no question for the second")

    far = world.far[0]
    far.send(encode(Kept(1)))
    with pytest.raises(InvalidModel, match="no question for the second"):
        world.leader._ask(questions())
    far.send(encode(Kept(2)))
    world.far[1].send(encode(Refused(Failure.of(InvalidModel("no")))))
    with pytest.raises(InvalidModel, match="no"):
        world.leader._ask([(1, AskBias("a")), (2, AskBias("a"))])
    far.send(encode(Kept(3)))
    assert world.leader._ask([(1, AskBias("b"))]) == [Kept(3)]
