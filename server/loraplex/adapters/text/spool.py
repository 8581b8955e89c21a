"""Where adapters' own text lies for front ends: one file a digest, in the server's private run directory.

The loader's thread writes a file of its own for each load (``write``); everything else is the engine loop's: a load
that ends well is kept under its digest (``adopt``), one that fails is forgotten (``discard``), and when the last
version with a digest ends (``drop``), its file goes. So a source directory may vanish once it was loaded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from loraplex.errors import OverCapacity
from loraplex.text.pack import AdapterText, pack_file
from loraplex.types import OwnText


class TextSpool:
    """Owns the files below ``directory``; without one, nothing is kept, and nobody reads."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._writes = itertools.count()
        self._versions: Counter[str] = Counter()

    def write(self, text: AdapterText | None) -> Path | None:
        """A file for a load in progress; None where there is nothing to write. The one method for another thread.

        Raises OverCapacity: it cannot be written; nothing of it is left.
        """
        if self._directory is None or text is None:
            return None
        file, content = self._directory / f"{next(self._writes)}.loading", text.pack.encode()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.write_bytes(content)
        except OSError as error:
            self.discard(file)
            raise OverCapacity(
                f"{len(content)} bytes of an adapter's own text cannot be kept in {self._directory}: {error.strerror}"
            ) from error
        return file

    def adopt(self, file: Path | None, text: OwnText | None) -> None:
        """A load ended well: what was written for it is there under its digest."""
        if file is None or self._directory is None or text is None:
            return
        self._versions[text.digest] += 1
        file.replace(pack_file(self._directory, text.digest))

    def discard(self, file: Path | None) -> None:
        """A load failed."""
        if file is not None:
            file.unlink(missing_ok=True)

    def drop(self, text: OwnText | None) -> None:
        """A version with this text has ended."""
        if self._directory is None or text is None:
            return
        self._versions[text.digest] -= 1
        if self._versions[text.digest] <= 0:
            del self._versions[text.digest]
            pack_file(self._directory, text.digest).unlink(missing_ok=True)
