"""The matrix of kinds can fail: each plausible mistake turns red exactly the adapters that it touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.kind_mutations import Report, main


@pytest.mark.filterwarnings("ignore")  # what mistakes lead to
def test_every_mistake_is_seen_where_it_is(kinds_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(kinds_root)
    said = capsys.readouterr().out
    assert code == 0, said
    assert len(said.splitlines()) > 20


def test_a_mistake_that_is_not_seen_is_told() -> None:
    lora, dora = frozenset(["lora"]), frozenset(["lora", "dora"])
    assert Report("seen", lora, lora).seen
    assert not Report("not seen everywhere", dora, lora).seen
    assert not Report("seen elsewhere", lora, dora).seen
    assert not Report("touches nothing", frozenset(), frozenset()).seen
