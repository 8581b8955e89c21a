"""Would this adapter load on that base, and what would it touch? The pure function behind ``loraplex lint``."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.load import BUILT_IN, load_adapter
from loraplex.adapters.source import any_directory
from loraplex.errors import LoraplexError
from loraplex.types import Coverage


@dataclass(frozen=True, slots=True)
class LintReport:
    """``refusal`` is None when the adapter would load; the rest describes what it would do, and is empty otherwise."""

    source: str
    refusal: LoraplexError | None = None
    uid: str = ""
    kind: str = ""
    coverage: Coverage = field(default_factory=lambda: Coverage({}, {}))
    max_rank: int = 0
    num_parameters: int = 0
    nbytes: int = 0

    @property
    def ok(self) -> bool:
        return self.refusal is None


def lint(source: str, base: BaseView, *, max_bytes: int, kinds: KindRegistry = BUILT_IN) -> LintReport:
    """Load ``source`` against ``base`` as a server would, and say what came of it. Reads files; raises nothing."""
    try:
        delta = load_adapter(any_directory(source), base, max_bytes=max_bytes, kinds=kinds)
    except LoraplexError as refusal:
        return LintReport(source, refusal)
    return LintReport(
        source=source,
        uid=delta.uid,
        kind=delta.kind,
        coverage=delta.coverage,
        max_rank=delta.max_rank,
        num_parameters=delta.num_parameters,
        nbytes=delta.nbytes,
    )
