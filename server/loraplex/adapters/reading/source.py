"""Where adapters may come from: SOURCE strings resolved to directories inside what the operator allows.

Owns path rules only; knows nothing of what the files mean. A directory is walked open component by component without
following links, after its real path was found to lie inside an allowed root, so that swapping a link in between gains
nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from loraplex.config import AdaptersConfig
from loraplex.errors import InvalidAdapter, InvalidRequest, NotFound, NotPermitted, UnsupportedFeature

CONFIG_FILE: Final = "adapter_config.json"
TENSOR_FILE: Final = "adapter_model.safetensors"
MAX_SOURCE_BYTES: Final = 4096
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_FILESYSTEM_ROOT: Final = Path("/")


@dataclass(frozen=True, slots=True)
class AdapterDir:
    """A resolved source: its name in messages, its real path, and the directory that its files may not leave."""

    shown: str
    path: Path
    root: Path

    def where(self, file: str) -> str:
        """The file as messages name it."""
        return f"{self.shown.rstrip('/')}/{file}"

    def has(self, file: str) -> bool:
        """Whether there is such an entry, whatever it is."""
        return os.path.lexists(self.path / file)

    @contextmanager
    def open(self, file: str) -> Iterator[int]:
        """A read-only descriptor of a regular file of this directory.

        Raises:
            InvalidAdapter: it is missing, unreadable or not a regular file.
            NotPermitted: it is a link that leads out of the allowed directories.
        """
        where = self.where(file)
        real = _real_path(self.path / file, where)
        if not real.is_relative_to(self.root):
            raise NotPermitted(f"{where} is a link that leads out of the allowed directories")
        try:
            fd = _open_inside(self.root, real)
        except FileNotFoundError:
            raise InvalidAdapter(self._missing(file)) from None
        except OSError as error:
            raise InvalidAdapter(f"{where}: cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidAdapter(f"{where}: not a regular file")
            yield fd
        finally:
            os.close(fd)

    def _missing(self, file: str) -> str:
        if file != TENSOR_FILE:
            return f"{self.where(file)} is missing"
        try:
            pickles = sorted(name for name in os.listdir(self.path) if name.endswith(_PICKLE_SUFFIXES))
        except OSError:
            pickles = []
        if not pickles:
            return f"{self.where(file)} is missing"
        return (
            f"{self.where(file)} is missing and {pickles[0]} is a pickle, which is never read: it can run code. "
            f"Convert it where you trust it: load the adapter with PEFT and call save_pretrained(DIR)"
        )


class AdapterSources:
    """The operator's rules: the allowed directories, and the sources named on the command line."""

    def __init__(self, roots: Iterable[Path], named: Iterable[Path] = ()) -> None:
        """``roots`` are directories that sources may lie in; ``named`` are directories allowed as they are."""
        self._roots = tuple(_real_path(root, str(root)) for root in roots)
        self._named = frozenset(_real_path(path, str(path)) for path in named)

    @classmethod
    def from_config(cls, config: AdaptersConfig) -> AdapterSources:
        """The rules that a server's configuration states."""
        local = [path for _, source in config.preload if (path := _local_path(source)) is not None]
        return cls([Path(root) for root in config.adapter_dirs], local)

    def resolve(self, source: str) -> AdapterDir:
        """The directory that ``source`` names: a path, ``file://``, or a path relative to an allowed directory.

        Raises:
            InvalidRequest: empty, too long, or with control characters.
            UnsupportedFeature: a scheme or an archive that is not read.
            NotPermitted: outside the allowed directories, by ``..`` or by a link.
            NotFound: allowed, but not there.
            InvalidAdapter: not a directory.
        """
        path = _checked_path(source)
        operator = _real_path(path, source)
        if operator in self._named:
            return _existing(AdapterDir(source, operator, _FILESYSTEM_ROOT))
        candidates = [path] if path.is_absolute() else [root / path for root in self._roots]
        found = [self._inside(source, _real_path(candidate, source)) for candidate in candidates]
        inside = [directory for directory in found if directory is not None]
        present = next((directory for directory in inside if os.path.exists(directory.path)), None)
        if present is None and len(inside) < max(len(found), 1):
            allowed = ", ".join(str(root) for root in self._roots) or "none; start the server with --adapter-dir DIR"
            raise NotPermitted(f"source {source!r} lies outside the allowed directories ({allowed})", field="source")
        if present is None:
            roots = ", ".join(str(root) for root in self._roots)
            raise NotFound(f"source {source!r} does not exist in the allowed directories ({roots})", field="source")
        return _existing(present)

    def _inside(self, shown: str, real: Path) -> AdapterDir | None:
        root = next((root for root in self._roots if real.is_relative_to(root)), None)
        return None if root is None else AdapterDir(shown, real, root)


def any_directory(path: str) -> AdapterDir:
    """``path`` as the operator at the terminal may name it: anywhere. For tools without a server.

    Raises:
        InvalidRequest, UnsupportedFeature, NotFound, InvalidAdapter: as ``AdapterSources.resolve``.
    """
    return _existing(AdapterDir(path, _real_path(_checked_path(path), path), _FILESYSTEM_ROOT))


def read_small_file(directory: AdapterDir, file: str, max_bytes: int) -> bytes:
    """A whole file of at most ``max_bytes``.

    Raises:
        InvalidAdapter: it is missing or larger.
    """
    with directory.open(file) as fd:
        pieces: list[bytes] = []
        left = max_bytes + 1
        while left and (piece := os.read(fd, left)):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise InvalidAdapter(f"{directory.where(file)} is larger than {max_bytes} bytes")
    return b"".join(pieces)


def _checked_path(source: str) -> Path:
    if not source or len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"source must be 1 to {MAX_SOURCE_BYTES} bytes, got {len(source)}", field="source")
    if not source.isprintable():
        raise InvalidRequest(f"source {source[:100]!r} holds control characters", field="source")
    path = _local_path(source)
    if path is None:
        scheme = source.split(":", 1)[0]
        raise UnsupportedFeature(
            f"source {source!r}: {scheme}:// is not read; name a directory or file:///DIR", field="source"
        )
    if source.lower().endswith(_ARCHIVE_SUFFIXES):
        raise UnsupportedFeature(f"source {source!r}: archives are not read; unpack it to a directory", field="source")
    return path


def _local_path(source: str) -> Path | None:
    """The path a source names on this machine, None for another scheme. Raises InvalidRequest: no URL."""
    if "://" not in source:
        return Path(source)
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise InvalidRequest(f"source {source!r} is not a URL: {error}", field="source") from None
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        return None
    return Path(unquote(parts.path))


def _existing(found: AdapterDir) -> AdapterDir:
    if not os.path.exists(found.path):
        raise NotFound(f"source {found.shown!r} does not exist", field="source")
    if not os.path.isdir(found.path):
        raise InvalidAdapter(f"source {found.shown!r} is not a directory", field="source")
    return found


def _real_path(path: Path, shown: str) -> Path:
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        raise NotPermitted(f"{shown}: the path cannot be resolved (a loop of links, or an invalid name)") from None


def _open_inside(root: Path, real: Path) -> int:
    """Open ``real``, which lies below ``root``, following no link on the way. O_NONBLOCK: a pipe must not hang us."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(root, flags | os.O_DIRECTORY)
    try:
        *parents, name = real.relative_to(root).parts or (".",)
        for part in parents:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=fd)
    finally:
        os.close(fd)
