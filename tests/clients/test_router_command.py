"""``loraplex router``: what it builds is loaded and chooses so, and what it cannot build is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from loraplex.cli import main
from loraplex.types import AdapterRef, Request, StopRule
from tests.engines import local_engine
from tests.own_text import ship_generation
from tests.rpc.serving import TEMPLATE, ids_of
from tests.servers import tiny_base
from tests.small_lora import write_adapter

FOX, DOG = ["the quick brown fox", "a brown fox", "quick fox"], ["lazy dog", "over the lazy dog", "dog lazy dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("router-command"))


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    (fox := tmp_path / "fox.txt").write_text("\n\n".join(FOX))
    chat = [{"text": DOG[0]}, {"messages": [{"role": "user", "content": DOG[1]}]}, {"text": DOG[2]}]
    (dog := tmp_path / "dog.jsonl").write_text("\n".join(map(json.dumps, chat)))
    return {"fox": fox, "dog": dog, "out": tmp_path / "made" / "router"}


def build(files: Mapping[str, Path], base: Path, *more: str) -> int:
    examples = [f"--examples={name}={files[name]}" for name in ("fox", "dog")]
    return main(["router", "build", str(files["out"]), "--model", str(base), *examples, *more])


def test_what_is_built_chooses_so_when_it_is_tried_and_when_it_is_served(
    files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(files, base) == 0
    said = capsys.readouterr()
    assert f"{files['out']}: a router among 2 adapters, centroid" in said.out
    assert "right on 6 of its own examples' 6: 100%" in said.out
    assert "prompts ..." in said.err
    assert main(["router", "try", str(files["out"]), "--model", str(base), "brown quick fox", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["chosen"] == "fox"
    assert list(answer["probabilities"]) == ["fox", "dog"]
    scored = ["router", "score", str(files["out"]), "--model", str(base)]
    assert main([*scored, f"--examples=dog={files['dog']}", f"--examples=fox={files['fox']}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "right": 6,
        "prompts": 6,
        "chosen": {"dog": {"dog": 3}, "fox": {"fox": 3}},
    }
    assert main(["router", "try", str(files["out"]), "--model", str(base), "lazy dog"]) == 0
    assert "chosen: dog" in capsys.readouterr().out
    for name, rank in (("fox", 1), ("dog", 2)):
        write_adapter(files["out"].parent / name, base, rank)
    engine = local_engine(base, adapter_dirs=(files["out"].parent,))
    for name in ("router", "fox", "dog"):
        engine.load_adapter(name, name)
    request = Request("r", tuple(ids_of("brown quick fox")), (AdapterRef("auto:router"),), stop=StopRule(max_tokens=1))
    routing = engine.generate([request])[0].routing
    assert routing is not None
    assert routing.adapter == "fox"
    assert routing.candidates[0].probability == pytest.approx(answer["probabilities"]["fox"], abs=1e-5)


def test_chats_are_rendered_with_the_bases_template(
    files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a text, a rendered chat has the tokens of the chat: so both are chosen for alike."""
    assert build(files, base, "--chat") == 0
    rendered = TEMPLATE.replace("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "user: a fox\n")
    found = []
    for arguments in (("a fox", "--chat"), (rendered,), ("a fox",)):
        capsys.readouterr()
        assert main(["router", "try", str(files["out"]), "--model", str(base), "--json", *arguments]) == 0
        found.append(json.loads(capsys.readouterr().out)["probabilities"])
    assert found[0] == found[1] != found[2]


def test_arrow_reads_adapters(files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [
        f"--adapter={name}={write_adapter(files['out'].parent / name, base, 2 + len(name))}" for name in ("a", "bc")
    ]
    command = ["router", "build", str(files["out"]), "--model", str(base), *adapters]
    assert main([*command, "--prototypes", "2", "--threshold", "0.6", "--default", "a"]) == 0
    assert "a router among 2 adapters, arrow, temperature 0.02" in capsys.readouterr().out
    values = json.loads((files["out"] / "router.json").read_text())
    assert (values["feature"], values["threshold"], values["default"]) == ("arrow", 0.6, "a")
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    texted = write_adapter(files["out"].parent / "texted", base, 4)
    ship_generation(texted, eos_token_id=7)
    other = str(files["out"].parent / "other")
    assert main(["router", "build", other, "--model", str(base), f"--adapter=t={texted}"]) == 1
    assert "adapter 't'" in (said := capsys.readouterr().err)
    assert "of its own" in said
    assert not Path(other).exists()


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (["--feature", "arrow"], 2, "feature arrow reads the adapters themselves"),
        (["--adapter", "cat=x"], 2, "--adapter cat has no --examples"),
        (["--adapter", "fox=x", "--adapter", "fox=y"], 2, "--adapter fox is given twice"),
        (["--adapter", "fox=x", "--feature", "arrow"], 2, "--examples are for dog, which no --adapter names"),
        (["--examples", "auto:r=x"], 1, "'auto:r' asks for a router"),
        (["--examples", "fox=x"], 1, "examples x: cannot be read"),
        (["--default", "auto:r"], 1, "'auto:r' asks for a router"),
        (["--threshold", "2"], 1, "threshold: 2; allowed are 0 to 1"),
        (["--prototypes", "65"], 1, "prototypes: 65; allowed are 1 to 64"),
        (["--temperature", "1e-9"], 1, "temperature: 1e-09; at least 1e-05"),
    ],
)
def test_what_cannot_be_built_is_said(
    files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, problem: str
) -> None:
    import re

    assert build(files, base, *more) == code
    assert re.search(problem, said := capsys.readouterr().err), said
    assert not files["out"].exists()


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "there is no prompt in it"),
        ("{", ":1: not JSON"),
        ('{"text": "a"}\n{"text": ""}', ":2: text must be a string"),
        ('{"text": "a", "messages": []}', 'either "text" or "messages"'),
        ('{"messages": [{"role": "user"}]}', 'a "role" and a "content"'),
    ],
)
def test_examples_that_are_none_are_named(
    files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str], lines: str, problem: str
) -> None:
    files["dog"].write_text(lines)
    assert build(files, base) == 1
    assert problem in capsys.readouterr().err
    assert not files["out"].exists()


def test_examples_for_a_name_that_it_does_not_know_are_refused(
    files: Mapping[str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(files, base) == 0
    scored = ["router", "score", str(files["out"]), "--model", str(base)]
    assert main([*scored, f"--examples=cat={files['fox']}"]) == 1
    assert "the router chooses among fox, dog" in capsys.readouterr().err
