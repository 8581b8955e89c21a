"""Which slot of the state pool each running sequence has, and which of its states are kept for others and for later.

Policy only: no torch here. States are saved behind page borders alone, where the prefix index can name them, and a
sequence keeps few of them, because a slot is as large as the keys and values of many pages:

- of its prompt the ones behind its last full page that leaves a token to compute, which the same prompt, or one that
  begins with it, goes on from;
- where a longer prefix of the prompt was known by its tokens than by its states, those behind that prefix: two prompts
  have parted there, and the third that has it goes on from it;
- of its answer the latest, in one slot that moves on with every page that is filled. The next turn of a chat goes on
  from there, and so does the sequence itself when it was preempted.

A save takes a blank slot or that of the snapshot whose last use is oldest; where sequences wait it leaves one for the
first of them. What was saved becomes a snapshot once the logits behind it were finite.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.engine.sequence import Chunk, HeldStates, Save, Sequence
from loraplex.state.pages import PageAllocator
from loraplex.state.slots import StateSlots


@dataclass(frozen=True, slots=True)
class StatePolicy:
    """``saves``: whether there is a prefix index to save states for. ``limits_prompt_steps``: the model computes a
    token of a prompt differently from a generated one, so that states and pages of an answer are nobody else's."""

    saves: bool = True
    limits_prompt_steps: bool = False


class SequenceStates:
    """Owns what running sequences hold of the slots. Touched by the scheduler alone."""

    def __init__(self, slots: StateSlots, pages: PageAllocator, policy: StatePolicy) -> None:
        self.slots = slots
        self._pages = pages
        self._policy = policy

    def begin_step(self) -> None:
        """A step is about to be put together."""
        self.slots.begin_step()

    def shareable(self, sequence: Sequence) -> int:
        """How many of its first tokens are computed as any sequence that begins with them would compute them."""
        return sequence.prompt_len if self._policy.limits_prompt_steps else sequence.num_tokens

    def restorable(self, known: list[int]) -> list[int]:
        """Of the pages of the index that hold a sequence's first tokens, those that it can go on behind."""
        return known[: self.slots.restorable(known)]

    def admit(self, sequence: Sequence, shared: list[int], num_known: int) -> bool:
        """Take a slot for a sequence that goes on behind the restorable pages ``shared``, of ``num_known`` that are in
        the index; False: there is none now."""
        begun = self.slots.begin(shared[-1] if shared else None)
        if begun is None:
            return False
        borders = self._borders(sequence, len(shared), num_known) if self._policy.saves else ()
        sequence.states = HeldStates(*begun, borders)
        return True

    def _borders(self, sequence: Sequence, num_shared: int, num_known: int) -> tuple[int, ...]:
        size, prompt_len = self._pages.page_size, sequence.prompt_len
        last, branch = (prompt_len - 1) // size * size, num_known * size
        return tuple(
            border
            for border in sorted({last, branch})
            if num_shared * size < border <= min(prompt_len, sequence.num_tokens)
        )

    def chunk(self, sequence: Sequence, count: int, *, leave: int) -> Chunk:
        """The next ``count`` tokens. ``leave``: slots that saves leave for others."""
        held, start = sequence.states, sequence.num_computed
        assert held is not None, "a chunk of a sequence that does not run"
        stop = start + count
        saves = [
            Save(border, slot, moving=False)
            for border in held.borders
            if start < border <= stop
            if (slot := self._spare(leave)) is not None
        ]
        moved = self._moved_to(sequence, start, stop)
        if moved and (slot := self._moving_slot(held, leave)) is not None:
            saves.append(Save(moved, slot, moving=True))
        held.saves += saves
        source, held.source = held.source, held.slot
        return Chunk(
            sequence,
            start,
            count,
            sample=stop == sequence.num_tokens,
            slot=held.slot,
            source=source,
            saves=tuple((save.num_tokens - start, save.slot) for save in saves),
        )

    def publish(self, sequence: Sequence, num_tokens: int, found: dict[int, int]) -> None:
        """Logits behind the first ``num_tokens`` tokens were finite: what was saved of these becomes snapshots.
        ``found``: number of pages -> the page of the index that is the last of them."""
        held = sequence.states
        assert held is not None, "states of a sequence that does not run"
        due = [save for save in held.saves if save.num_tokens <= num_tokens]
        held.saves = held.saves[len(due) :]
        for save in due:
            page = found.get(save.num_tokens // self._pages.page_size)
            if page is None:
                self.slots.give_back(save.slot)
                continue
            snapshot = self.slots.keep(save.slot, page)
            if save.moving:
                if held.moving is not None and self.slots.reclaim(held.moving):
                    self.slots.give_back(held.moving.slot)
                held.moving = snapshot

    def give_back(self, sequence: Sequence) -> None:
        """The sequence stops running: its slot, and what it was saving, are free; its snapshots stay."""
        held, sequence.states = sequence.states, None
        assert held is not None, "states of a sequence that does not run"
        for slot in (held.slot, *(save.slot for save in held.saves)):
            self.slots.give_back(slot)

    def _moved_to(self, sequence: Sequence, start: int, stop: int) -> int:
        """The last page border among tokens ``start : stop`` of its answer; 0: there is none to be saved."""
        if not self._policy.saves or self._policy.limits_prompt_steps:
            return 0
        border = stop // self._pages.page_size * self._pages.page_size
        return border if border > max(start, sequence.prompt_len) else 0

    def _moving_slot(self, held: HeldStates, leave: int) -> int | None:
        """The slot of the sequence's last moving snapshot, where nobody else came to need that; else a spare one."""
        last, held.moving = held.moving, None
        if last is not None and self.slots.reclaim(last):
            return last.slot
        return self._spare(leave)

    def _spare(self, leave: int) -> int | None:
        return self.slots.take() if self.slots.num_available > leave else None
