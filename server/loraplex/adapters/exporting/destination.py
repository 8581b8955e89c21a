"""Where exports go: directories that the operator allows, and a place in one that is whole or not there.

Everything is written to ``<name>.partial`` beside the destination and renamed once, when all of it is on the disk. A
marker in it says whose it is, and is locked for as long as its process lives: what a dead one has left is recognized
and removed, anything else is refused. Directories are opened component by component without following links, and
reached by those descriptors from then on. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from loraplex.adapters.reading.source import AdapterDir, open_inside
from loraplex.errors import AlreadyExists, ConversionFailed, InvalidRequest, NotFound, NotPermitted, OverCapacity

log = logging.getLogger("loraplex.adapters")

PARTIAL: Final = ".partial"
MARKER: Final = ".loraplex-export"
MAX_DESTINATION_BYTES: Final = 4096
_MAX_NAME_BYTES: Final = 255 - len(PARTIAL)
_MAGIC: Final = b"an export of loraplex that has not ended\n"
#: left free beside what is to be written: directories, and what else grows meanwhile
_SPARE_BYTES: Final = 1 << 20
_REFUSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_THERE: Final = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Place:
    """A checked destination: ``name`` in the real directory ``parent``, which lies in the allowed ``root``."""

    parent: Path
    name: str
    root: Path

    @property
    def path(self) -> Path:
        return self.parent / self.name


class ExportDirs:
    """The operator's rule: the directories that exports may go to."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(root.resolve() for root in roots)

    def place(self, destination: str) -> Place:
        """The place that ``destination`` names: a path, or one relative to the first allowed directory.

        Raises:
            InvalidRequest: empty, too long, no plain name at its end, or inside of an export in the making.
            NotPermitted: outside the allowed directories, by ``..`` or by a link; or none are allowed.
            NotFound: the directory that it is to be made in is not there.
        """
        if not self._roots:
            raise NotPermitted(
                "this server writes no exports: it was started without --export-dir DIR", field="destination"
            )
        path = self._roots[0] / _checked(destination)
        try:
            parent = path.parent.resolve()
        except (OSError, RuntimeError, ValueError):
            raise _refusal(destination, "cannot be resolved (a loop of links, or an invalid name)") from None
        root = next((root for root in self._roots if parent.is_relative_to(root)), None)
        if root is None:
            allowed = ", ".join(map(str, self._roots))
            raise NotPermitted(
                f"destination {destination!r} lies outside the directories that exports may go to ({allowed})",
                field="destination",
            )
        if not parent.is_dir():
            raise NotFound(
                f"destination {destination!r}: {str(parent)!r} is no directory; an export makes the last part of its "
                f"destination only",
                field="destination",
            )
        if any(part.endswith(PARTIAL) for part in parent.relative_to(root).parts):
            raise _refusal(destination, f"lies in {str(parent)!r}; what ends in {PARTIAL!r} is an export in the making")
        return Place(parent, path.name, root)


class Partial:
    """A directory in the making. Owned by the export that makes it."""

    def __init__(self, place: Place, parent_fd: int, fd: int) -> None:
        self._place = place
        self._parent_fd = parent_fd
        self._fd = fd

    @property
    def directory(self) -> AdapterDir:
        """It as a source, to read what was written."""
        place = self._place
        return AdapterDir(str(place.path), place.parent / (place.name + PARTIAL), place.root)

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A new file, on the disk when the block is over."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=self._fd)
        with os.fdopen(fd, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())

    def write(self, name: str, content: bytes) -> None:
        """A whole small file."""
        with self.file(name) as file:
            write_all(file, memoryview(content))

    def publish(self) -> None:
        """Give it its name. Raises AlreadyExists: something has it meanwhile."""
        name = self._place.name
        os.fsync(self._fd)
        _check_free(self._place, self._parent_fd)
        os.rename(name + PARTIAL, name, src_dir_fd=self._parent_fd, dst_dir_fd=self._parent_fd)
        try:
            os.unlink(MARKER, dir_fd=self._fd)  # not before: without it nobody would know whose a partial one is
            os.fsync(self._fd)
            os.fsync(self._parent_fd)
        except OSError as error:  # all of it is on the disk, and nobody is to be told that nothing was kept
            log.warning("%s is there, but its name may not be on the disk yet: %s", self._place.path, error)


@contextmanager
def opened(place: Place) -> Iterator[int]:
    """The directory that ``place`` is in, as a descriptor. What the system refuses inside is raised by name.

    Raises:
        AlreadyExists: something has the place's name.
        NotPermitted: the server may not write there, or the directory was swapped for a link.
        OverCapacity: the disk is full. ConversionFailed: it does not work.
    """
    try:
        fd = open_inside(place.root, place.parent)
    except OSError as error:
        raise NotPermitted(
            f"destination {str(place.path)!r}: {str(place.parent)!r} cannot be opened, or is no longer the directory "
            f"that it was: {error.strerror}",
            field="destination",
        ) from None
    try:
        _check_free(place, fd)
        yield fd
    except OSError as error:
        raise _named(error, place) from error
    finally:
        os.close(fd)


def check_space(place: Place, parent_fd: int, num_bytes: int) -> None:
    """Raises OverCapacity: the file system has no room for ``num_bytes``."""
    found = os.fstatvfs(parent_fd)
    free = found.f_bavail * found.f_frsize
    if num_bytes + _SPARE_BYTES > free:
        raise OverCapacity(
            f"destination {str(place.path)!r}: the export takes {num_bytes} bytes, {free} are free there",
            field="destination",
        )


@contextmanager
def making(place: Place, parent_fd: int) -> Iterator[Partial]:
    """A partial directory for ``place``, which is gone when the block ends without ``publish``.

    Raises:
        AlreadyExists: another export is making it, or something has the partial one's name and is no leftover.
    """
    name = place.name + PARTIAL
    _remove_leftover(place, parent_fd)
    os.mkdir(name, 0o755, dir_fd=parent_fd)
    fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)
    lock: int | None = None
    try:
        lock = os.open(MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, _MAGIC)
        yield Partial(place, parent_fd, fd)
    finally:
        _discard(name, parent_fd, fd)
        os.close(fd)
        if lock is not None:
            os.close(lock)


def write_all(file: BinaryIO, content: memoryview, give_way: Callable[[], None] = lambda: None) -> None:
    """Write all of it, in pieces that let other threads go on. ``give_way`` is called between them."""
    piece = 4 << 20
    content = content.cast("B")
    for start in range(0, len(content), piece):
        if start:
            give_way()
        left = content[start : start + piece]
        while left:
            left = left[file.write(left) :]


def _checked(destination: str) -> Path:
    size = len(destination.encode("utf-8", "replace"))
    if not 0 < size <= MAX_DESTINATION_BYTES:
        raise InvalidRequest(
            f"destination has {size} bytes, allowed are 1 to {MAX_DESTINATION_BYTES}", field="destination"
        )
    if not destination.isprintable():
        raise _refusal(destination, "holds control characters")
    if "://" in destination:
        raise _refusal(destination, "is no path; name a directory that is to be made")
    path = Path(destination)
    if path.name in ("", "..") or path.name.endswith(PARTIAL) or len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
        raise _refusal(
            destination,
            f"ends in no plain name; allowed are 1 to {_MAX_NAME_BYTES} bytes that do not end in {PARTIAL!r}",
        )
    return path


def _refusal(destination: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"destination {destination[:200]!r} {problem}", field="destination")


def _check_free(place: Place, parent_fd: int) -> None:
    with suppress(FileNotFoundError):
        os.stat(place.name, dir_fd=parent_fd, follow_symlinks=False)
        raise _exists(place)


def _exists(place: Place) -> AlreadyExists:
    return AlreadyExists(
        f"destination {str(place.path)!r} exists; exports overwrite nothing: name another, or remove it first",
        field="destination",
    )


def _remove_leftover(place: Place, parent_fd: int) -> None:
    """Take away what an export that did not end has left, if that is there. Raises AlreadyExists: it is not that."""
    name = place.name + PARTIAL
    try:
        found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return
    strange = AlreadyExists(
        f"{str(place.path) + PARTIAL!r} is in the way, and nothing that an export has left (no {MARKER} in it); "
        f"remove it, or name another destination",
        field="destination",
    )
    if not stat.S_ISDIR(found.st_mode):
        raise strange
    fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)
    try:
        if not os.listdir(fd):  # it ended before it had a marker
            os.rmdir(name, dir_fd=parent_fd)
            return
        try:
            marker = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            raise strange from None
        try:
            _lock_dead(marker, place)
            if os.read(marker, len(_MAGIC) + 1) not in (_MAGIC, b""):
                raise strange
            log.warning("removing %s%s, which an export that did not end has left", place.path, PARTIAL)
            shutil.rmtree(name, dir_fd=parent_fd)
        finally:
            os.close(marker)
    finally:
        os.close(fd)


def _lock_dead(marker: int, place: Place) -> None:
    """Hold the marker of a dead export. Raises AlreadyExists: its process lives, or somebody else has just removed
    it."""
    with suppress(OSError):
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(marker).st_nlink:
            return
    raise AlreadyExists(f"an export to {str(place.path)!r} is in progress", field="destination", retry_after_s=1.0)


def _discard(name: str, parent_fd: int, fd: int) -> None:
    """Remove the partial directory ``fd``, where it still has its name."""
    try:
        found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        if os.path.samestat(found, os.fstat(fd)):
            shutil.rmtree(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return  # published
    except OSError as error:
        log.error("cannot remove %s, which an export made: %s", name, error)


def _named(error: OSError, place: Place) -> Exception:
    what = f"destination {str(place.path)!r}: {error.strerror or error}"
    if error.errno in _REFUSED:
        return NotPermitted(f"{what}: the server may not write there", field="destination")
    if error.errno in _FULL:
        return OverCapacity(f"{what}: nothing of it was kept", field="destination")
    if error.errno in _THERE:
        return _exists(place)
    return ConversionFailed(f"{what}: nothing of it was kept")
