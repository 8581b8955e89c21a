"""The folder a load's files go to: checked before the load, and every file made whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path


class OutDirUnwritable(Exception):
    """Nothing can be written there."""


class OutDir:
    """A folder, made if need be. Raises OutDirUnwritable when no file can be made in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise OutDirUnwritable(f"--out {path}: cannot be written: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> str:
        """Write a file whole, and give its name back. Raises OutDirUnwritable, and an earlier one stays as it was."""
        path, partial = self.path / name, self.path / f".{name}.partial"
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutDirUnwritable(f"{path}: cannot be written: {error.strerror}") from error
        return name

    def remove(self, name: str) -> None:
        """Take away what an earlier load left under ``name``, if anything."""
        (self.path / name).unlink(missing_ok=True)
