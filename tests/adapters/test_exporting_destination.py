"""Where exports may go, and that one is whole or not there, whatever happens on the way. No model, no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraplex.adapters.exporting.destination import MARKER, ExportDirs, check_space, making, opened
from loraplex.errors import (
    AlreadyExists,
    ConversionFailed,
    InvalidRequest,
    LoraplexError,
    NotFound,
    NotPermitted,
    OverCapacity,
)
from tests.servers import environment

_DIES = """
import os, sys
from pathlib import Path
from loraplex.adapters.exporting.destination import ExportDirs, making, opened
place = ExportDirs([Path(sys.argv[1])]).place("model")
with opened(place) as fd, making(place, fd) as partial:
    partial.write("model.safetensors", b"half")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "exports"
    (path / "inner").mkdir(parents=True)
    return path


def export(root: Path, name: str = "model", content: bytes = b"whole") -> Path:
    place = ExportDirs([root]).place(name)
    with opened(place) as fd, making(place, fd) as partial:
        partial.write("file", content)
        partial.publish()
    return place.path


def test_a_place_is_a_path_or_relative_to_the_first_directory(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    dirs = ExportDirs([root, other])
    assert dirs.place("a").path == root / "a"
    assert dirs.place("inner/a").path == root / "inner" / "a"
    assert dirs.place(str(other / "a")).path == other / "a"


@pytest.mark.parametrize(
    ("destination", "error", "part"),
    [
        ("../a", NotPermitted, "outside the directories that exports may go to"),
        ("inner/../../a", NotPermitted, "outside"),
        ("/etc/a", NotPermitted, "outside"),
        ("link/a", NotPermitted, "outside"),
        ("loop/a", InvalidRequest, "loop of links"),
        ("none/a", NotFound, "none' is no directory"),
        ("file/a", NotFound, "file' is no directory"),
        ("", InvalidRequest, "0 bytes, allowed are 1 to 4096"),
        ("a" * 5000, InvalidRequest, "5000 bytes, allowed are 1 to 4096"),
        ("a" * 255, InvalidRequest, "allowed are 1 to 247 bytes"),
        ("a.partial", InvalidRequest, "'.partial'"),
        ("b.partial/a", InvalidRequest, "an export in the making"),
        ("b.partial/inner/a", InvalidRequest, "an export in the making"),
        ("to-partial/a", InvalidRequest, "an export in the making"),
        ("inner/..", InvalidRequest, "no plain name"),
        ("/", InvalidRequest, "no plain name"),
        ("a\nb", InvalidRequest, "control characters"),
        ("s3://bucket/a", InvalidRequest, "is no path"),
    ],
)
def test_other_places_are_refused_by_name(root: Path, destination: str, error: type[LoraplexError], part: str) -> None:
    (root / "link").symlink_to("/tmp")
    (root / "loop").symlink_to("loop")
    (root / "b.partial" / "inner").mkdir(parents=True)
    (root / "to-partial").symlink_to("b.partial")
    (root / "file").write_text("")
    with pytest.raises(error, match=part) as caught:
        ExportDirs([root]).place(destination)
    assert caught.value.field == "destination"


def test_without_a_directory_there_are_no_exports() -> None:
    with pytest.raises(NotPermitted, match="without --export-dir DIR"):
        ExportDirs([]).place("a")


def test_what_is_written_has_its_name_when_it_is_whole(root: Path) -> None:
    place = ExportDirs([root]).place("model")
    with opened(place) as fd, making(place, fd) as partial:
        partial.write("file", b"content")
        assert sorted(path.name for path in root.iterdir()) == ["inner", "model.partial"]
        with partial.directory.open("file") as written:
            assert os.read(written, 10) == b"content"
        partial.publish()
    assert [path.name for path in (root / "model").iterdir()] == ["file"]
    assert (root / "model" / "file").read_bytes() == b"content"
    assert sorted(path.name for path in root.iterdir()) == ["inner", "model"]


def test_what_fails_leaves_nothing(root: Path) -> None:
    def fail() -> None:
        place = ExportDirs([root]).place("model")
        with opened(place) as fd, making(place, fd) as partial:
            partial.write("file", b"content")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in root.iterdir()] == ["inner"]


def test_what_was_put_in_the_place_of_a_partial_one_is_left_alone(root: Path) -> None:
    place, way = ExportDirs([root]).place("model"), root / "model.partial"

    def fail() -> None:
        with opened(place) as fd, making(place, fd):
            way.rename(root / "moved")
            way.mkdir()
            (way / "mine").write_text("mine")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (way / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "directory", "full directory", "link", "dangling link"])
def test_nothing_is_overwritten(root: Path, kind: str) -> None:
    taken = root / "model"
    match kind:
        case "file":
            taken.write_text("mine")
        case "directory":
            taken.mkdir()
        case "full directory":
            taken.mkdir()
            (taken / "mine").write_text("")
        case "link":
            taken.symlink_to(root / "inner")
        case "dangling link":
            taken.symlink_to(root / "nowhere")
    before = os.lstat(taken)
    with pytest.raises(AlreadyExists), opened(ExportDirs([root]).place("model")):
        raise AssertionError("not refused before anything is written")
    with pytest.raises(AlreadyExists, match="exports overwrite nothing"):
        export(root)
    assert os.lstat(taken) == before
    assert sorted(path.name for path in root.iterdir()) == ["inner", "model"]


@pytest.mark.parametrize("kind", ["file", "full directory", "link"])
def test_nor_what_comes_meanwhile(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rename = ExportDirs([root]).place("model"), os.rename

    def take() -> None:
        if kind == "file":
            place.path.write_text("mine")
        elif kind == "link":
            place.path.symlink_to(root / "inner")
        else:
            place.path.mkdir()
            (place.path / "mine").write_text("")

    def late(*args: object, **kwargs: object) -> None:  # between the last look and the system's
        take()
        rename(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(AlreadyExists, match="exports overwrite nothing"):
        export(root)
    assert sorted(path.name for path in root.iterdir()) == ["inner", "model"]
    assert kind != "file" or place.path.read_text() == "mine"


def test_a_directory_that_is_swapped_for_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    place = ExportDirs([root]).place("inner/model")
    (root / "inner").rmdir()
    (root / "inner").symlink_to(tmp_path)
    with pytest.raises(NotPermitted, match="no longer the directory that it was"), opened(place):
        raise AssertionError("opened")
    assert not (tmp_path / "model").exists()


def test_too_little_space_is_refused_in_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bavail=3000, f_frsize=1024))
    place = ExportDirs([root]).place("model")
    with opened(place) as fd:
        check_space(place, fd, 2_000_000)
        with pytest.raises(OverCapacity, match=r"the export takes 2100000 bytes, 3072000 are free"):
            check_space(place, fd, 2_100_000)


@pytest.mark.parametrize(
    ("call", "code", "error"),
    [
        ("mkdir", errno.EROFS, NotPermitted),
        ("mkdir", errno.EACCES, NotPermitted),
        ("fsync", errno.ENOSPC, OverCapacity),
        ("fsync", errno.EDQUOT, OverCapacity),
        ("fsync", errno.EIO, ConversionFailed),
        ("rename", errno.EPERM, NotPermitted),
    ],
)
def test_what_the_system_refuses_is_named_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, error: type[LoraplexError]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(error, match=os.strerror(code)):
        export(root)
    assert [path.name for path in root.iterdir()] == ["inner"]


@pytest.mark.parametrize("call", ["unlink", "fsync"])
def test_what_has_its_name_is_there_whatever_the_system_says_then(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    rename = os.rename

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def named(*args: object, **kwargs: object) -> None:
        rename(*args, **kwargs)  # type: ignore[call-overload]
        monkeypatch.setattr(os, call, refuse)

    monkeypatch.setattr(os, "rename", named)
    assert (export(root) / "file").read_bytes() == b"whole"
    assert "its name may not be on the disk yet: [Errno 5]" in caplog.text


def test_what_a_dead_process_left_is_recognized_and_removed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    died = subprocess.run([sys.executable, "-c", _DIES, str(root)], env=environment(), check=False)
    assert died.returncode == -9
    assert sorted(path.name for path in (root / "model.partial").iterdir()) == [MARKER, "model.safetensors"]
    assert export(root).is_dir()
    assert sorted(path.name for path in root.iterdir()) == ["inner", "model"]
    assert "which an export that did not end has left" in caplog.text


def test_one_that_died_before_it_had_a_marker_is_replaced(root: Path) -> None:
    (root / "model.partial").mkdir()
    assert (export(root) / "file").read_bytes() == b"whole"


def test_what_another_process_is_at_is_left_alone(root: Path) -> None:
    place = ExportDirs([root]).place("model")
    with opened(place) as fd, making(place, fd) as partial:
        partial.write("file", b"first")
        with pytest.raises(AlreadyExists, match="in progress"):
            export(root)
        partial.publish()
    assert (root / "model" / "file").read_bytes() == b"first"


@pytest.mark.parametrize("kind", ["directory", "other marker", "link to a marker", "file", "link"])
def test_what_only_looks_like_a_leftover_is_left_alone(root: Path, kind: str) -> None:
    way = root / "model.partial"
    match kind:
        case "file":
            way.write_text("mine")
        case "link":
            way.symlink_to(root / "inner")
        case _:
            way.mkdir()
            (way / "mine").write_text("mine")
    if kind == "other marker":
        (way / MARKER).write_text("something else")
    elif kind == "link to a marker":
        (way / MARKER).symlink_to(root / "marker")
    with pytest.raises(AlreadyExists, match="is in the way"):
        export(root)
    assert os.path.lexists(way)
    assert not way.is_dir() or way.is_symlink() or (way / "mine").read_text() == "mine"


def test_a_marker_that_was_removed_meanwhile_is_somebody_elses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process found the same leftover, removed it and began anew, before this one had its lock."""
    (root / "model.partial").mkdir()
    marker, lock = root / "model.partial" / MARKER, fcntl.flock
    marker.write_bytes(b"")

    def late(fd: int, how: int) -> None:
        with suppress(FileNotFoundError):
            marker.unlink()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(AlreadyExists, match="in progress"):
        export(root)
    assert (root / "model.partial").is_dir()
