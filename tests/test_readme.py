"""The README: its table of kinds has every peft_type that PEFT knows, served or refused as the code has it, and its
commands are such."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from peft import PeftType

from loraplex.adapters.kinds.refusals import REASONS
from loraplex.cli import main

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


def commands() -> list[list[str]]:
    """The lines of the README's code blocks that ask a running server something."""
    blocks = README.read_text().split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match("loraplex (generate|adapters) ", line)]


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_every_command_to_a_server_is_one(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It gets as far as to find no server; a word or flag that is none ends with 2."""
    assert main([*argv, "--server", "127.0.0.1:1"]) == 1
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err


def test_its_commands_are_found() -> None:
    assert {(argv[0], argv[1]) for argv in commands()} >= {("adapters", "merge"), ("generate", "--chat")}
