"""``loraplex lint`` from the command line: one adapter or many, as a table or as JSON, with and without a probe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.cli import main
from tests.own_text import chat_base, own_template, ship_generation, ship_tokenizer
from tests.small_lora import write_adapter
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama")


def test_one_adapter_is_told_in_full(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "good", base, rank=3)
    assert main(["lint", str(adapter), "--model", str(base)]) == 0
    out = capsys.readouterr().out
    assert "q_proj" in out
    assert "low rank" in out
    assert f"{adapter} loads on" in out
    assert "logits move by" in out


def test_what_is_missing_is_told(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "good", base, rank=3)
    (adapter / "adapter_config.json").unlink()
    assert main(["lint", str(adapter), "--model", str(base)]) == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err
    assert main(["lint", str(adapter), "--model", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert main(["lint", str(tmp_path / "nowhere"), "--model", str(base)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_directory_of_adapters(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "fr", base, rank=3)
    write_adapter(tmp_path / "teams" / "a" / "de", base, rank=5, use_rslora=True)
    write_adapter(tmp_path / "teams" / "b", base, rank=2, r=4)
    (tmp_path / "teams" / "loop").symlink_to(tmp_path)
    assert main(["lint", str(tmp_path), "--model", str(base)]) == 1
    told = capsys.readouterr()
    for word in ("fr", "teams/a/de", "rslora", "2 of 3 load"):
        assert word in told.out
    assert f"refused {tmp_path}/teams/b\n  InvalidAdapter: " in told.err
    assert "where adapter_config.json says 4" in told.err


def test_a_directory_without_its_config_is_not_passed_over(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "good", base, rank=3)
    (write_adapter(tmp_path / "bare", base, rank=3) / "adapter_config.json").unlink()
    assert main(["lint", str(tmp_path), "--model", str(base)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 load" in told.out
    assert f"refused {tmp_path}/bare" in told.err


def test_only_a_probe_has_columns_and_words(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / name, base, rank=3)
    for flags, tried in (([], True), (["--no-probe"], False)):
        assert main(["lint", str(tmp_path), "--model", str(base), *flags]) == 0
        told = capsys.readouterr()
        assert ("top-1" in told.out) == tried
        assert "\n\n" not in told.err, "no empty line after the progress"


def test_json_is_one_list(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_adapter(tmp_path / "good", base, rank=3)
    bad = write_adapter(tmp_path / "bad", base, rank=2, use_qalora=True)
    assert main(["lint", str(good), str(bad), "--model", str(base), "--json"]) == 1
    served, refused = json.loads(capsys.readouterr().out)
    assert (served["source"], served["ok"], served["kind"], served["max_rank"]) == (str(good), True, "lora", 3)
    assert served["modules"] == {"q_proj": {"sites": 1, "rank": 3, "changes": "low rank"}}
    assert served["probe"]["max_change"] > 0
    assert (refused["ok"], refused["error"]["class"], refused["error"]["field"]) == (
        False,
        "UnsupportedFeature",
        "use_qalora",
    )


def test_without_a_probe_the_base_is_not_run(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "good", base, rank=3)
    found = []
    for flags in ([], ["--no-probe"]):
        assert main(["lint", str(adapter), "--model", str(base), "--json", *flags]) == 0
        found += json.loads(capsys.readouterr().out)
    tried, read = found
    assert tried["uid"] == read["uid"]
    assert tried["modules"] == read["modules"]
    assert read["probe"] is None


def test_an_adapter_too_weak_to_change_a_logit_is_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "weak", base, rank=3, lora_alpha=1e-30)
    assert main(["lint", str(adapter), "--model", str(base)]) == 1
    assert "the adapter changes nothing" in capsys.readouterr().err


def test_text_of_its_own_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = chat_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "fr", base, rank=3)
    ship_tokenizer(base, adapter, [], template=own_template("!"))
    ship_generation(adapter, do_sample=True, temperature=0.5)
    for flags, told in (
        ([], "text: its own sampling\ntext: its chat template is not used"),
        (["--allow-adapter-templates"], "text: its own chat template, sampling\n"),
    ):
        assert main(["lint", str(adapter), "--model", str(base), "--no-probe", *flags]) == 0
        assert told in capsys.readouterr().out
