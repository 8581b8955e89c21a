"""A rank that is not the first: does its share of what it is told, in order, and answers questions beside that.

Whatever goes wrong here ends it: it could not be in step with the others any more, and they find out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from loraplex.adapters.base_view import view_of
from loraplex.adapters.delta import LowRank
from loraplex.adapters.folding import fold_sites
from loraplex.adapters.norms import as_matrix, squared_row_norms
from loraplex.adapters.packed import Write, footprint_of, pack_sites
from loraplex.config import Config
from loraplex.engine.graphs import GraphCapture
from loraplex.engine.inflight import DeviceTokens
from loraplex.engine.loader import stand_aside
from loraplex.engine.messages import Failure
from loraplex.engine.probe import Pieces, Prober
from loraplex.engine.rank import finish_rank, load_rank
from loraplex.engine.ranks.orders import (
    AskBias,
    AskSquares,
    AskWeight,
    Beat,
    ClearShare,
    End,
    Failed,
    ForgetShare,
    Joining,
    KeepShare,
    Kept,
    Loaded,
    NextPiece,
    Order,
    Question,
    Refused,
    Reply,
    RunStep,
    Serve,
    Serving,
    Tensor,
    TryOut,
    WriteShare,
    decode_order,
    decode_question,
    encode,
)
from loraplex.engine.ranks.shares import SlotMark, with_mark
from loraplex.engine.ranks.sockets import Socket
from loraplex.engine.ranks.wire import TensorWire
from loraplex.engine.runner import Runner
from loraplex.engine.work import StepWork
from loraplex.errors import GroupLost, LoraplexError
from loraplex.models.base import BaseModel
from loraplex.models.loader import ModelPlan
from loraplex.parallel.group import TPGroup
from loraplex_kernels.segments import Term

log = logging.getLogger("loraplex.ranks")


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of. ``join``: meets the others, all of which have begun; ``prepare`` is given the runner
    before the first order."""

    config: Config
    plan: ModelPlan
    join: Callable[[], TPGroup]
    orders: Socket
    questions: Socket
    capture: GraphCapture | None = None
    prepare: Callable[[Runner], None] = lambda runner: None


def work(parts: WorkerParts) -> None:
    """Load this rank's part and follow orders until ``End``. What cannot be loaded is answered, and ends it."""
    try:
        parts.orders.send(encode(Joining()))
        loaded = load_rank(parts.config, parts.plan, parts.join(), _no_progress)
        parts.orders.send(encode(Loaded(loaded.sizes, loaded.model.weight_bytes)))
        order = decode_order(parts.orders.recv())
        if isinstance(order, End):
            return
        assert isinstance(order, Serve), f"told {type(order).__name__} before there was a cache"
        runner = finish_rank(loaded, order.sizes, parts.capture, _no_progress)
    except GroupLost:
        raise  # the first rank finds out by itself
    except LoraplexError as error:
        parts.orders.send(encode(Failed(Failure.of(error))))
        return
    parts.prepare(runner)
    shares: dict[int, tuple[Write, ...]] = {}
    desk = _Desk(runner.model, SlotMark(loaded.backends.lora.slots), shares, parts.questions)
    threading.Thread(target=desk.run, name="rank-desk", daemon=True).start()
    parts.orders.send(encode(Serving()))
    _Follower(runner, shares, parts.orders).run()


def _no_progress(_stage: str, _done: int, _total: int) -> None:
    return None  # that of the first rank is shown: theirs are alike


class _Follower:
    """Owns the slots of this rank's tables and its side of every step."""

    def __init__(self, runner: Runner, shares: dict[int, tuple[Write, ...]], orders: Socket) -> None:
        """``shares`` are put there by the desk, before any order names them."""
        self._runner = runner
        self._shares = shares
        self._orders = orders
        self._prober = Prober(runner.model, runner.ops)
        self._trial: Pieces[torch.Tensor] | None = None
        self._drawn: DeviceTokens | None = None

    def run(self) -> None:
        """Until ``End``."""
        while True:
            order = decode_order(self._orders.recv())
            if isinstance(order, End):
                return
            self._follow(order)

    def _follow(self, order: Order) -> None:
        match order:
            case RunStep(work):
                self._step(work)
            case WriteShare(share, slot, done, total):
                writes = self._shares[share]
                for write in writes[len(writes) * done // total : len(writes) * (done + 1) // total]:
                    write.table.write(slot, write.packed)
            case ClearShare(share, slot):
                for write in self._shares[share]:
                    write.table.clear(slot)
            case ForgetShare(share):
                self._shares.pop(share, None)
            case TryOut(token_ids, start, slots):
                self._trial = self._prober.logits(token_ids, start, tuple(map(Term, slots)))
            case NextPiece():
                assert self._trial is not None, "a piece of no probe"
                next(self._trial, None)
            case Beat():
                self._orders.send(encode(order))
            case _:
                raise AssertionError(f"an order {type(order).__name__} in the middle of serving")

    def _step(self, work: StepWork) -> None:
        if work.groups is None:
            with torch.inference_mode():
                _, prompt_logits = self._runner.run(work)
                for _ in prompt_logits:
                    continue  # the first rank makes something of them
            return
        before, self._drawn = self._drawn, DeviceTokens()
        self._runner.launch(work, before, self._drawn)


class _Desk:
    """Answers questions, in a thread of its own that is a little less urgent than the steps."""

    def __init__(
        self, model: BaseModel, mark: SlotMark, shares: dict[int, tuple[Write, ...]], questions: Socket
    ) -> None:
        self._base = view_of(model)
        self._sites = self._base.by_name()
        self._tables = model.tables()
        self._mark = mark
        self._shares = shares
        self._questions = questions

    def run(self) -> None:
        """Until the socket goes."""
        stand_aside()
        while True:
            try:
                question = decode_question(self._questions.recv())
            except zmq.ContextTerminated:
                self._questions.close(linger=0)
                return
            try:
                reply = self._answer(question)
            except Exception as error:  # it belongs to the load that asked
                if not isinstance(error, LoraplexError):
                    log.exception("a question of the first rank: %s", type(question).__name__)
                reply = Refused(Failure.of(error))
            self._questions.send(encode(reply))

    def _answer(self, question: Question) -> Reply:
        match question:
            case KeepShare(share, uid, deltas, touched):
                sites = {sent.site: sent.delta() for sent in deltas}
                if touched:
                    laid_out = fold_sites(uid, sites, touched, self._tables, self._base)
                else:
                    laid_out = pack_sites(uid, sites, self._tables)
                writes = with_mark(laid_out, self._mark)
                self._shares[share] = writes
                return Kept(footprint_of(writes).nbytes)
            case AskWeight(site):
                return Tensor(TensorWire.of(self._base.weight(site)))
            case AskBias(site):
                bias = self._base.bias(site)
                return Tensor(None if bias is None else TensorWire.of(bias))
            case AskSquares(name, a, b, scale):
                weight = as_matrix(self._base.weight(name), self._sites[name])
                return Tensor(TensorWire.of(squared_row_norms(weight, LowRank(a.tensor(), b.tensor(), scale))))
