"""The probe: a short prompt with an adapter and without it, for the proof that the adapter does something, and works.

Two small forward passes over pages and a slot of their own, beside whatever else is served; the base's part of the
plain prompt is kept. Needs no engine: a model and its ops are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeVar

import torch

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.packed import PackedAdapter
from loraplex.engine.batch import Ops
from loraplex.engine.pools import new_cache, new_states
from loraplex.engine.ranks.orders import NextPiece, TryOut
from loraplex.errors import InvalidAdapter
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex.types import Probe
from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.states import StateSpan

#: tokens before and after those that an adapter asks for: few, because running streams wait for them
_OPENING: Final = 5
_CLOSING: Final = 3
#: 2^32 over the golden ratio: its multiples fall evenly over the vocabulary, wherever one stops
_STRIDE: Final = 0x9E3779B1


#: how far merged logits may be from those of the adapter itself, in parts of the largest logit: each dtype's rounding
#: of every layer's matrix, and what layers make of it
_ROUNDING: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
)

R = TypeVar("R")
Pieces = Generator[None, None, R]
"""Work that pauses where other work may run, and returns its result."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """``start``: where the adapter is on; ``num_known``: tokens before the first one that the base does not know."""

    token_ids: tuple[int, ...]
    start: int
    num_known: int


def _nobody(order: TryOut | NextPiece) -> None:
    return None


class Prober:
    """Tries adapters out on one model. Owner: the engine loop, or whoever has the model to itself."""

    def __init__(self, model: BaseModel, ops: Ops, tell: Callable[[TryOut | NextPiece], None] = _nobody) -> None:
        """``ops``: those the model was loaded with. ``tell``: other ranks, which hold parts of the model, what this one
        does next."""
        self._model = model
        self._ops = ops
        self._tell = tell
        self._kept: tuple[tuple[int, ...], torch.Tensor] | None = None  # the plain prompt's logits without an adapter

    def warm_up(self) -> None:
        """Run the base's part of the plain prompt, which most probes compare with, before anybody is served."""
        _whole(self._base(self._prompt((), ())))

    def try_out(self, adapter: PackedAdapter, slot: int = 0) -> Probe:
        """``probe`` of an adapter that is nowhere yet, by way of a free slot, which is free again afterwards.

        Raises as ``probe`` does, and MemoryError when the tables have no room.
        """
        try:
            for write in adapter.writes:
                write.table.write(slot, write.packed)
            return self.probe(slot, adapter.facts)
        finally:
            for write in adapter.writes:
                write.table.clear(slot)

    def probe(self, slot: int, facts: AdapterFacts) -> Probe:
        """``pieces`` at once."""
        return _whole(self.pieces(slot, facts))

    @torch.inference_mode()
    def pieces(self, slot: int, facts: AdapterFacts) -> Pieces[Probe]:
        """What the adapter in ``slot`` does to the logits of a prompt that suits it; pauses after each layer, in which
        steps may run. The slot must stay as it is until the end, where it waits for the device.

        Compared are the base's tokens at the positions where the adapter is on and the base knows every token so far:
        an added token has no logits without it.

        Raises InvalidAdapter: it changes no bit of them, and neither adds tokens nor says that it is an identity; or
        logits are not finite with it that are without it.
        """
        prompt, vocab_size = self._prompt(facts.telling_tokens, facts.invocation_tokens), self._model.vocab_size
        base = yield from self._base(prompt)
        rows = (yield from self.logits(prompt.token_ids, prompt.start, (Term(slot),)))[prompt.start :]
        known = rows[: max(prompt.num_known - prompt.start, 0), :vocab_size]
        without = base[prompt.start :][: len(known)]
        sound = torch.isfinite(without).all(-1)  # [positions]: what the base cannot do, it need not do
        own = rows[:, : max(vocab_size, facts.vocab_size)]
        broken = ~torch.isfinite(own).all(-1)
        broken[: len(sound)] &= sound
        if bool(broken.any()):
            raise InvalidAdapter(
                f"the adapter (uid {facts.uid}) turns logits non-finite at {int(broken.sum())} of {len(rows)} "
                f"positions of a prompt of {len(prompt.token_ids)} tokens: its weights are too large for "
                f"{str(self._model.dtype).removeprefix('torch.')}"
            )
        found = _compare(known[sound], without[sound], len(prompt.token_ids))
        if not found.max_change and not facts.identity and facts.vocab_size <= vocab_size:
            raise InvalidAdapter(
                f"the adapter changes nothing: with it (uid {facts.uid}) the logits of a prompt of "
                f"{len(prompt.token_ids)} tokens are those of the base, bit for bit: its tensors are zero, neutral, "
                f"or too small for {str(self._model.dtype).removeprefix('torch.')}"
            )
        return found

    @torch.inference_mode()
    def agreement(self, facts: AdapterFacts, slots: tuple[int, ...]) -> Pieces[Probe]:
        """How far the merged form of an adapter, in the first of two ``slots``, is from the adapter in the second, over
        a prompt that suits it; pauses and slots as in ``pieces``. ``facts`` are the merged form's.

        Raises InvalidAdapter: by more than rounding.
        """
        token_ids = self._prompt(facts.telling_tokens, ()).token_ids
        width = max(self._model.vocab_size, facts.vocab_size)
        merged = (yield from self.logits(token_ids, 0, (Term(slots[0]),)))[:, :width]
        apart = (yield from self.logits(token_ids, 0, (Term(slots[1]),)))[:, :width]
        sound = torch.isfinite(apart).all(-1)  # [positions]: what cannot be done apart need not be done merged
        found = _compare(merged[sound], apart[sound], len(token_ids))
        scale = float(apart[sound].abs().max()) if bool(sound.any()) else 0.0
        allowed = _ROUNDING[self._model.dtype] * scale
        if not found.max_change <= allowed:  # nor where it is not a number
            raise InvalidAdapter(
                f"the merged form (uid {facts.uid}) moves logits of a prompt of {len(token_ids)} tokens by "
                f"{found.max_change:.3g} from those of the adapter itself, which is more than rounding "
                f"({allowed:.3g}): it is not served merged"
            )
        return found

    def _prompt(self, telling: tuple[int, ...], invocation: tuple[int, ...]) -> _Prompt:
        vocab_size = self._model.vocab_size
        spread = [(index * _STRIDE % (1 << 32)) * vocab_size >> 32 for index in range(1, 1 + _OPENING + _CLOSING)]
        known = [token for token in telling if token < vocab_size]
        added = [token for token in telling if token >= vocab_size]
        opening = [*spread[:_OPENING], *known]
        whole = [*opening, *invocation, *spread[_OPENING:], *added]
        cut = max(len(whole) - self._model.max_position, 0)  # from the front: what matters stands at the end
        token_ids = tuple(whole[cut:])
        return _Prompt(
            token_ids,
            start=max(len(opening) - cut, 0) if invocation else 0,
            num_known=next((i for i, token in enumerate(token_ids) if token >= vocab_size), len(token_ids)),
        )

    @torch.inference_mode()
    def _base(self, prompt: _Prompt) -> Pieces[torch.Tensor]:
        """Logits ``[num_known, V]`` without an adapter, of a prompt as long as the base can follow it."""
        token_ids = prompt.token_ids[: prompt.num_known]
        if self._kept is not None and self._kept[0] == token_ids:
            return self._kept[1]
        logits = yield from self.logits(token_ids, len(token_ids), ())
        if len(token_ids) == _OPENING + _CLOSING:  # most adapters ask for no token: one prompt serves them all
            self._kept = (token_ids, logits)
        return logits

    @torch.inference_mode()
    def logits(self, token_ids: tuple[int, ...], start: int, terms: tuple[Term, ...]) -> Pieces[torch.Tensor]:
        """Logits ``[T, V]`` float32 of a prompt whose rows from ``start`` on have ``terms``."""
        model, ops, count = self._model, self._ops, len(token_ids)
        if not count:
            return torch.empty(0, model.vocab_size, device=ops.device)
        own, pages = self._own_ops(count)
        adapters = ops.lora.prepare(plan_rows([(start, ()), (count - start, terms)]))
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64, device=ops.device),
            positions=torch.arange(count, device=ops.device),
            attention=own.attend([SequenceSpan(count, count, pages)]),
            kv_cache=own.kv_cache,
            adapters=adapters,
            states=None if own.states is None else own.states.prepare([StateSpan(count, slot=0, num_limited=count)]),
        )
        self._tell(TryOut(token_ids, start, tuple(term.slot for term in terms)))
        pieces = model.forward_in_pieces(batch)
        while True:
            self._tell(NextPiece())
            try:
                next(pieces)
            except StopIteration as end:
                return model.head(end.value, adapters)
            yield

    def _own_ops(self, num_tokens: int) -> tuple[Ops, range]:
        """The ops over memory of one sequence of ``num_tokens``, and its pages in that."""
        model, ops = self._model, self._ops
        pages, cache, states = range(0), None, None
        if ops.kv_cache is not None:
            page_size = ops.kv_cache.page_size
            pages = range(1, 1 + -(-num_tokens // page_size))
            cache = new_cache(model, ops.attention, 1 + len(pages), page_size)
        pool = new_states(model, 1)
        if ops.states is not None and pool is not None:
            states = replace(ops.states, pool=pool)
        return replace(ops, kv_cache=cache, states=states), pages


def _whole(pieces: Pieces[R]) -> R:
    """Without pauses."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: R = end.value
            return result


def _compare(logits: torch.Tensor, base: torch.Tensor, num_tokens: int) -> Probe:
    """Of rows ``[n, V]`` with and without an adapter, all finite."""
    if not len(logits):
        return Probe(0.0, 0.0, num_tokens)
    change = float((logits - base).abs().max())
    changed = float((logits.argmax(-1) != base.argmax(-1)).float().mean())
    return Probe(change, changed, num_tokens)
