"""Spooled text: there while a version with it is loaded, gone with the last, and nothing left of failed loads."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.text.spool import TextSpool
from loraplex.errors import OverCapacity
from loraplex.text.pack import AdapterText, TextPack, pack_file, read_pack
from loraplex.types import OwnText


def text(digest: str) -> AdapterText:
    return AdapterText(OwnText(digest), TextPack(chat_template=digest))


@given(steps=st.lists(st.tuples(st.sampled_from(["load", "fail", "end"]), st.sampled_from("abc")), max_size=30))
def test_files_are_those_of_loaded_versions(tmp_path_factory: object, steps: list[tuple[str, str]]) -> None:
    root = tmp_path_factory.mktemp("spool")  # type: ignore[attr-defined]
    spool = TextSpool(root / "text")
    versions: list[str] = []
    for what, digest in [("fail", "a"), *steps]:  # the first write makes the directory
        if what != "end":
            file = spool.write(text(digest))
            assert file is not None
            if what == "load":
                spool.adopt(file, OwnText(digest))
                versions.append(digest)
            else:
                spool.discard(file)
        elif digest in versions:
            versions.remove(digest)
            spool.drop(OwnText(digest))
        assert {path.name for path in (root / "text").iterdir()} == {f"{digest}.text" for digest in versions}
        for known in versions:
            assert read_pack(pack_file(root / "text", known)).chat_template == known


def test_only_the_server_s_user_may_look(tmp_path: Path) -> None:
    TextSpool(tmp_path / "text").write(text("a"))
    assert (tmp_path / "text").stat().st_mode & 0o077 == 0


def test_a_full_disk_refuses_a_load_and_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: Path, content: bytes) -> int:
        with file.open("wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OverCapacity, match="No space left"):
        TextSpool(tmp_path / "text").write(text("a"))
    assert list((tmp_path / "text").iterdir()) == []


def test_without_a_directory_nothing_is_written() -> None:
    spool = TextSpool(None)
    assert spool.write(text("a")) is None
    spool.adopt(None, OwnText("a"))
    spool.discard(None)
    spool.drop(OwnText("a"))
