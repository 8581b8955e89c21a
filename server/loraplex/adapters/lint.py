"""Would these adapters load on that base, and what would they do? The pure functions behind ``loraplex lint``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.reading.source import CONFIG_FILE, TENSOR_FILE, AdapterDir, any_directory
from loraplex.errors import LoraplexError

#: directories below the one that is named that are looked into for adapters
_DEEPEST: Final = 4

Check = Callable[[AdapterDir], AdapterFacts]
"""Reads, lowers and tries an adapter as a server does at load; raises what a server would answer."""


@dataclass(frozen=True, slots=True)
class LintReport:
    """``refusal`` is None when the adapter would load, and ``facts`` says what it would do; one of them is None."""

    source: str
    facts: AdapterFacts | None
    refusal: LoraplexError | None = None

    @property
    def ok(self) -> bool:
        return self.refusal is None


def find_adapters(source: str) -> tuple[str, ...]:
    """``source`` itself where it is an adapter's directory, else every adapter below it, by path.

    With no adapter anywhere it is the source again: loading it says what it lacks.

    Raises:
        InvalidRequest, UnsupportedFeature, NotFound, InvalidAdapter: ``source`` cannot be read.
    """
    directory = any_directory(source)
    if (directory.path / CONFIG_FILE).is_file():
        return (source,)
    return tuple(sorted(_below(Path(source).expanduser()))) or (source,)


def lint(source: str, check: Check) -> LintReport:
    """Load ``source`` as a server would, and say what came of it. Raises nothing."""
    try:
        return LintReport(source, check(any_directory(source)))
    except LoraplexError as refusal:
        return LintReport(source, None, refusal)


def _below(directory: Path) -> Iterator[str]:
    """Links are not followed: they may lead in circles. An adapter without its config is found too, and refused."""
    for path, folders, files in os.walk(directory):
        is_adapter = CONFIG_FILE in files or TENSOR_FILE in files
        if is_adapter:
            yield path
        if is_adapter or len(Path(path).relative_to(directory).parts) >= _DEEPEST:
            folders.clear()
