"""A result that may never come is watched while it is waited for."""

from __future__ import annotations

import pytest

from loraplex.engine.stream import watched
from loraplex.errors import GroupLost


def test_who_waits_looks_round_now_and_then_until_it_is_done() -> None:
    looks: list[int] = []
    watched(lambda: len(looks) == 3, lambda: looks.append(1))
    assert len(looks) == 3
    watched(lambda: True, lambda: pytest.fail("there was nothing to wait for"))


def test_what_is_seen_meanwhile_ends_the_wait() -> None:
    def check() -> None:
        raise GroupLost("rank 1 of 2 ended")

    with pytest.raises(GroupLost, match="rank 1 of 2 ended"):
        watched(lambda: False, check)
