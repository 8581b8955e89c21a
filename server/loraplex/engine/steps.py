"""The steps: one is scheduled and launched while the one before it runs, where the device has a stream.

Knows nothing of who asked. A token that is drawn and not yet known counts as a token (``engine/sequence.py``), so that
the next step can be scheduled without it; a sequence which that token ends has a row too many in that step, and what
comes of the row is passed over. What cannot be decided from counts waits for the step in flight first: a draw that
needs the tokens before it on the host, and a schedule that might preempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraplex.engine.executor import Executor
from loraplex.engine.generations import Generations
from loraplex.engine.inflight import InFlight
from loraplex.engine.messages import StepReport
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Batch, SequenceState
from loraplex.errors import GroupLost, InternalError

log = logging.getLogger("loraplex.engine")

#: consecutive steps that may raise before the engine gives itself up
_MAX_FAILED_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step, and when its launch began."""

    step: InFlight
    start_s: float


class Steps:
    """Owns the step in flight, of which there is at most one between two turns."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        generations: Generations,
        *,
        report: Callable[[StepReport], None],
        clock: Callable[[], float],
    ) -> None:
        """``report`` is told of every step that ran, ``clock`` gives monotonic seconds."""
        self.executor = executor
        self._scheduler = scheduler
        self._generations = generations
        self._report = report
        self._clock = clock
        self._flying: _Launched | None = None
        self._last_end_s = 0.0
        self._num_failed = 0

    @property
    def has_work(self) -> bool:
        """Whether a step is in flight or could be."""
        return self._flying is not None or self._scheduler.has_work

    def settle(self) -> None:
        """Take in the step in flight: when this returns there is none."""
        self._settle()

    def advance(self) -> bool:
        """Launch the next step and take in the one before it; False when there was neither.

        Raises InternalError when too many steps in a row have failed, GroupLost when ranks are gone.
        """
        was_flying = self._flying is not None
        if was_flying and self._scheduler.may_preempt():
            self._settle()
        batch = self._scheduler.schedule() if self._scheduler.has_work else Batch()
        if self._flying is not None and not (batch.chunks and self.executor.overlaps(batch)):
            self._settle()
            # what ended just now has given back its pages
            batch.chunks = [c for c in batch.chunks if c.sequence.state is SequenceState.RUNNING]
        if batch.chunks:
            self._launch(batch)
        return bool(batch.chunks) or was_flying

    def _launch(self, batch: Batch) -> None:
        start = self._clock()
        for chunk in batch.chunks:
            chunk.sequence.admitted_s = chunk.sequence.admitted_s or start
        previous = self._flying
        try:
            step = self.executor.launch(batch, previous.step if previous else None)
        except GroupLost:
            raise
        except Exception as error:
            self._settle()  # the step before is whole: its tokens are told before anyone fails
            self._fail(batch, error)
            return
        self._scheduler.launched(batch)
        launched = _Launched(step, start)
        self._settle(launched)
        if step.is_over:
            self._settle()

    def _settle(self, following: _Launched | None = None) -> None:
        """Take in the step in flight, if there is one; ``following`` was launched behind it and is in flight now."""
        launched, self._flying = self._flying, following
        if launched is None:
            return
        batch = launched.step.batch
        try:
            result = self.executor.wait(launched.step)
        except GroupLost:
            raise
        except Exception as error:
            self._flying = None
            if following is not None:  # it reads what this one should have written
                batch = Batch([*batch.chunks, *following.step.batch.chunks])
            self._fail(batch, error)
            return
        self._num_failed = 0
        self._generations.commit(batch, result)
        self._tell(launched)

    def _fail(self, batch: Batch, error: Exception) -> None:
        self._num_failed += 1
        ids = ", ".join(dict.fromkeys(chunk.sequence.request.request_id for chunk in batch.chunks))
        log.error("step failed; requests %s", ids, exc_info=error)
        self._generations.fail(batch, error)
        if self._num_failed >= _MAX_FAILED_STEPS:
            raise InternalError(f"{self._num_failed} steps in a row failed") from error

    def _tell(self, launched: _Launched) -> None:
        batch, end = launched.step.batch, self._clock()
        prefill = sum(c.count for c in batch.chunks if c.start + c.count <= c.sequence.prompt_len)
        report = StepReport(
            step_s=end - max(launched.start_s, self._last_end_s),
            prefill_tokens=prefill,
            decode_tokens=batch.num_tokens - prefill,
            sequences=len(batch.chunks),
            adapters=len({on.uid for c in batch.chunks for on in c.sequence.uses.active}),
        )
        self._last_end_s = end
        self._report(report)
