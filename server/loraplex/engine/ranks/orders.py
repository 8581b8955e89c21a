"""What the first rank tells the others, in the order in which all of them do it, and what they answer.

Plain numbers, and tensors by value, in msgpack. A rank says how far it has come at the start (``Joining``, ``Loaded``,
and ``Serving`` after ``Serve``); later it answers ``Beat`` alone. Questions are asked by the adapter loader's thread,
one at a time, and answered beside the steps.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from loraplex.config import Config
from loraplex.engine.messages import Failure
from loraplex.engine.pools import PoolSizes
from loraplex.engine.ranks.wire import DeltaWire, TensorWire
from loraplex.engine.work import StepWork
from loraplex.parallel.rendezvous import Meeting
from loraplex.parallel.shared_place import SharedPlace


class RankStart(msgspec.Struct, frozen=True, tag=True):
    """What the first rank tells the process of another one, as one line of JSON on its standard input.

    ``digest`` is that of the code that runs and of the checkpoint's files, as the first rank sees them. ``place``: open
    files that the process has inherited, where all ranks are on one machine.
    """

    config: Config
    model_dir: str
    meeting: Meeting
    orders: str
    questions: str
    digest: str
    place: SharedPlace | None = None


# ---- orders: first rank -> others ----


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Take pools of these sizes, and follow orders from now on."""

    sizes: PoolSizes


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Your share of a step."""

    work: StepWork


class WriteShare(msgspec.Struct, frozen=True, tag=True):
    """Put pieces of a share into a slot: as many of its own as bring it from ``done`` to ``done + 1`` of ``total``."""

    share: int
    slot: int
    done: int
    total: int


class ClearShare(msgspec.Struct, frozen=True, tag=True):
    """Take a share out of a slot."""

    share: int
    slot: int


class ForgetShare(msgspec.Struct, frozen=True, tag=True):
    """Nobody will ask for this share again."""

    share: int


class TryOut(msgspec.Struct, frozen=True, tag=True):
    """Begin the forward pass of a probe, to be done piece by piece; one that has not ended is given up."""

    token_ids: tuple[int, ...]
    start: int
    slots: tuple[int, ...]


class NextPiece(msgspec.Struct, frozen=True, tag=True):
    """Go on with the probe."""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Are you there? Answered by the same."""


class End(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


Order = Serve | RunStep | WriteShare | ClearShare | ForgetShare | TryOut | NextPiece | Beat | End


# ---- answers to orders ----


class Joining(msgspec.Struct, frozen=True, tag=True):
    """This rank is like the first one, and goes to meet the others."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are there, and there is room for pools of these sizes."""

    sizes: PoolSizes
    weight_bytes: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """Ready for steps."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """This rank could not start, and ends."""

    failure: Failure


Answer = Joining | Loaded | Serving | Failed | Beat


# ---- questions, and their answers ----


class KeepShare(msgspec.Struct, frozen=True, tag=True):
    """Lay this part of an adapter out, and keep it under this number; folded into your part of the base where the
    sites are ``touched`` that the whole adapter changes, else beside it. Answered by ``Kept``."""

    share: int
    uid: str
    deltas: tuple[DeltaWire, ...]
    touched: tuple[str, ...] = ()


class AskWeight(msgspec.Struct, frozen=True, tag=True):
    """Your part of the base's weight at a site. Answered by ``Tensor``."""

    site: str


class AskBias(msgspec.Struct, frozen=True, tag=True):
    """Your part of the base's bias at a site."""

    site: str


class AskSquares(msgspec.Struct, frozen=True, tag=True):
    """The squared norms of the rows of your part of the base's weight at a site with a low-rank change of it."""

    site: str
    a: TensorWire
    b: TensorWire
    scale: float


Question = KeepShare | AskWeight | AskBias | AskSquares


class Kept(msgspec.Struct, frozen=True, tag=True):
    """What the share takes of this rank's adapter memory."""

    nbytes: int


class Tensor(msgspec.Struct, frozen=True, tag=True):
    """A tensor, where there is one."""

    wire: TensorWire | None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The question could not be answered."""

    failure: Failure


Reply = Kept | Tensor | Refused


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise TypeError(f"{type(value).__name__} has no form on the wire")


def _decoded(kind: Any, value: Any) -> Any:
    if kind is np.ndarray or getattr(kind, "__origin__", None) is np.ndarray:
        return np.frombuffer(value, np.int64).copy()  # a device may be sent it as it is
    raise TypeError(f"{kind} has no form on the wire")


encode: Final = msgspec.msgpack.Encoder(enc_hook=_encoded).encode
decode_order: Final = msgspec.msgpack.Decoder(Order, dec_hook=_decoded).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
decode_question: Final = msgspec.msgpack.Decoder(Question).decode
decode_reply: Final = msgspec.msgpack.Decoder(Reply).decode
