"""The README's table of kinds: every peft_type that PEFT knows is in it, served or refused as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftType

from loraplex.adapters.kinds.refusals import REASONS

README = Path(__file__).parents[1] / "README.md"


def rows() -> list[tuple[str, str]]:
    """(names, answer) of the table's rows."""
    text = README.read_text()
    table = text[text.index("| `peft_type` |") :].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(cell[0], cell[1]) for cell in cells]


@pytest.mark.parametrize("peft_type", sorted(member.value for member in PeftType))
def test_every_peft_type_has_its_row(peft_type: str) -> None:
    answers = {answer for names, answer in rows() if re.search(rf"`{peft_type}`", names)}
    assert answers, f"README's table of kinds does not name {peft_type}"
    assert (answers & {"yes", "where it fits"} == set()) is (peft_type in REASONS)
