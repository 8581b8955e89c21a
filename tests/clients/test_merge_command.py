"""``loraplex adapters merge``, against a real server with a fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from loraplex.cli import main
from loraplex.commands.progress import working
from loraplex_client import Client
from tests.rpc.serving import Served, serving_thread


@pytest.fixture
def server() -> Iterator[Served]:
    with serving_thread() as served:
        yield served


@pytest.fixture
def address(server: Served, capsys: pytest.CaptureFixture[str]) -> list[str]:
    flags = ["--server", server.app.address]
    for name in ("json", "pirate"):
        assert main(["adapters", "load", *flags, name, f"/a/{name}"]) == 0
    capsys.readouterr()
    return flags


def cells(out: str) -> list[tuple[str, ...]]:
    lines = [line.split("│") for line in out.splitlines()]
    return [tuple(cell.strip() for cell in line[1:-1]) for line in lines if len(line) > 2]


def test_merge_and_show(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ties", "--density", "0.5", "--majority-sign", "frequency", "--pin"]
    assert main(["adapters", "merge", *address, "both", "json:0.6", "pirate:-1", *options]) == 0
    told = capsys.readouterr()
    source = ("source", "0.6 json - pirate by ties, density 0.5, majority_sign_method frequency")
    assert source in cells(told.out)
    assert ("lost", "relative error of a site up to 2.00%, on average 1.00%") in cells(told.out)
    assert ("where", "device, pinned") in cells(told.out)
    began, ended = told.err.splitlines()
    assert began == "merging json + pirate (ties) ..."
    assert ended.startswith("done in 0.")
    assert main(["adapters", "show", *address, "both"]) == 0
    assert source in cells(capsys.readouterr().out)
    assert main(["adapters", "list", *address]) == 0
    assert source[1] in [row[-1] for row in cells(capsys.readouterr().out)]
    assert main(["adapters", "merge", *address, "both", "json"]) == 1
    assert "'both' is loaded" in capsys.readouterr().err
    assert main(["adapters", "merge", *address, "both", "json", "--replace"]) == 0
    assert ("source", "json by cat") in cells(capsys.readouterr().out)


def test_all_options_arrive(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--svd-rank", "4", "--svd-clamp", "0.99", "--seed", "7", "--density", "0.5"]
    assert main(["adapters", "merge", *address, "both", "json", "--method", "dare_linear_svd", *options]) == 0
    assert main(["adapters", "merge", *address, "less", "json", "--max-error", "0.25"]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", "--json", *address]) == 0
    listed = {adapter["name"]: adapter for adapter in json.loads(capsys.readouterr().out)}
    assert listed["json"]["merge"] is None
    merge = listed["both"]["merge"]
    keys = ("method", "density", "svd_rank", "svd_clamp", "max_error", "seed")
    assert [merge[key] for key in keys] == ["dare_linear_svd", 0.5, 4, 0.99, 0, 7]
    assert listed["less"]["merge"]["max_error"] == 0.25


def test_a_recipe_loads_as_a_source(address: list[str], server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "merge", *address, "both", "json", "pirate"]) == 0
    with Client(server.app.address) as client:
        source = client.get_adapter("both").source
    assert len(source) > 255  # more than a file may be called
    assert main(["adapters", "load", *address, "again", source]) == 0
    assert ("source", "a merge of 'json' and 'pirate' (cat)") in cells(capsys.readouterr().out)


def test_what_cannot_be_merged(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "merge", *address, "both", "json", "nope"]) == 1
    assert "'nope' is not loaded" in capsys.readouterr().err
    assert main(["adapters", "merge", *address, "both", "json:2", "json"]) == 1
    assert "'json' is named twice; name it once, as json:WEIGHT" in capsys.readouterr().err
    for wrong in (["--method", "mean"], ["--density", "many"], ["--seed", "-1"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["adapters", "merge", *address, "both", *(["json"] if wrong else []), *wrong])
        assert (wrong[0] if wrong else "INPUT") in capsys.readouterr().err


def test_an_interrupt_says_that_the_server_goes_on(
    address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "merge_adapters", interrupted)
    assert main(["adapters", "merge", *address, "both", "json"]) == 130
    assert "the server goes on with it: `loraplex adapters show both` tells" in capsys.readouterr().err


def test_a_terminal_has_a_clock() -> None:
    console = Console(force_terminal=True, width=80, record=True)
    with working(console, "merging json"):
        pass
    shown = console.export_text()
    assert "merging json" in shown
    assert "0:00:00" in shown
