"""Kinds of other distributions: found at start, asked, served as docs/KINDS.md says; a broken one refuses the start."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.kinds import KINDS
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.kinds.registry import KindRegistry, find_kinds
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig, parse_config
from loraplex.adapters.reading.keys import COMMON_KEYS, KeyRules, served
from loraplex.adapters.reading.source import any_directory
from loraplex.errors import InternalError, InvalidAdapter, InvalidConfig, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.types import AdapterRef, Request, StopRule
from tests.adapters.peft_sites import MAX_BYTES, check_sites, save_adapter
from tests.engines import local_engine
from tests.fakes_adapters import view_of, write_adapter
from tests.oracle import Oracle
from tests.servers import environment
from tests.tiny import oracle, prompt, tiny_checkpoint, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "KINDS.md"
NUM_TOKENS = 6


def example() -> str:
    """The module of docs/KINDS.md."""
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def install(root: Path, patch: pytest.MonkeyPatch, module: str, source: str, *points: str) -> None:
    """A distribution of one module, as an installer leaves it, whose import path is this test's."""
    root.mkdir(exist_ok=True)
    (root / f"{module}.py").write_text(source)
    info = root / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loraplex.adapter_kinds]\n" + "".join(f"{point}\n" for point in points))
    patch.syspath_prepend(str(root))


@pytest.fixture
def beft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KindRegistry:
    install(tmp_path / "site", monkeypatch, "loraplex_beft", example(), "BEFT = loraplex_beft:KIND")
    return find_kinds()


def test_nothing_is_installed_here() -> None:
    assert find_kinds() == KindRegistry()
    assert find_kinds().names == tuple(kind.name for kind in KINDS)


#: imports each module of the adapters' room in turn as if it were the first
IMPORT_EACH = """
import importlib, pkgutil, sys
import loraplex.adapters
for name in sorted(found.name for found in pkgutil.walk_packages(loraplex.adapters.__path__, "loraplex.adapters.")):
    for known in [known for known in sys.modules if known.split(".")[0] == "loraplex"]:
        del sys.modules[known]
    importlib.import_module(name)
    print(name)
"""


def test_what_a_kind_imports_it_may_import_first() -> None:
    command = [sys.executable, "-c", IMPORT_EACH]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert {"loraplex.adapters.reading.site_tensors", "loraplex.adapters.kinds.base"} <= {*done.stdout.split()}


def test_names_of_kinds_are_their_own() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)


def test_the_example_is_found_and_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path / "site", monkeypatch, "loraplex_beft", example(), "BEFT = loraplex_beft:KIND")
    with caplog.at_level(logging.INFO, "loraplex.adapters"):
        kinds = find_kinds()
    assert "adapter kind beft for peft_type BEFT, of loraplex-beft 1.0" in caplog.text
    assert "adapter kind beft for peft_type BEFT, of loraplex-beft 1.0" in DOCS.read_text()
    assert kinds.names[-1] == "beft"
    assert 'BEFT = "loraplex_beft:KIND"' in DOCS.read_text()


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_example_equals_peft_at_every_site(tmp_path: Path, beft: KindRegistry, arch: str) -> None:
    model = tiny_model(arch)
    config = peft.BeftConfig(target_modules=["v_proj", "down_proj"])
    adapted = save_adapter(model, tmp_path / "adapter", config)
    source = any_directory(str(tmp_path / "adapter"))
    delta = load_adapter(source, view_of(model), max_bytes=MAX_BYTES, kinds=beft)
    check_sites(model, adapted, delta)
    assert delta.kind == "beft"
    assert delta.coverage.sites == {"v_proj": 2, "down_proj": 2}
    with pytest.raises(UnsupportedFeature, match=r"peft_type=BEFT is not served: docs/KINDS\.md"):
        load_adapter(source, view_of(model), max_bytes=MAX_BYTES)


def test_the_example_is_served(tmp_path: Path, beft: KindRegistry) -> None:
    assert beft.installed
    base, path = tiny_checkpoint(tmp_path, "qwen2"), tmp_path / "adapter"
    save_adapter(oracle(base), path, peft.BeftConfig(target_modules=["q_proj", "v_proj"]), strength=1.0)
    expected = Oracle(base, {"b": path})
    engine = local_engine(base, adapter_dirs=(tmp_path,), lora_backend="reference", attention_backend="reference")
    assert engine.load_adapter("b", str(path)).kind == "beft"
    adapters: tuple[tuple[AdapterRef, ...], ...] = ((AdapterRef("b"),), ())
    stop = StopRule(max_tokens=NUM_TOKENS, ignore_eos=True)
    tickets = [
        engine.submit(Request(f"r{number}", prompt(9), adapters=refs, stop=stop))
        for number, refs in enumerate(adapters)
    ]
    engine.run_until_idle()
    got = [engine.generations[ticket].token_ids for ticket in tickets]
    assert got == [expected.greedy(name, prompt(9), NUM_TOKENS) for name in ("b", None)]
    assert got[0] != got[1]


NEW_TYPE = example().replace('name = "beft"', 'name = "shifted"')


def test_a_peft_type_that_peft_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"peft_type": "SHIFTED", "target_modules": ["q_proj"]}).encode()
    with pytest.raises(InvalidAdapter, match="peft_type is 'SHIFTED'"):
        parse_config(raw, "x", also_known=KindRegistry().also_known)
    install(tmp_path / "site", monkeypatch, "loraplex_shifted", NEW_TYPE, "SHIFTED = loraplex_shifted:KIND")
    kinds = find_kinds()
    path = write_adapter(
        tmp_path / "adapter",
        {"peft_type": "SHIFTED", "target_modules": ["q_proj"]},
        {f"base_model.model.model.layers.{layer}.self_attn.q_proj.beft_bias": torch.ones(1, 32) for layer in (0, 1)},
    )
    delta = load_adapter(any_directory(str(path)), view_of(tiny_model("llama")), max_bytes=MAX_BYTES, kinds=kinds)
    assert delta.kind == "shifted"
    # it is not asked about what is not its own, though it says yes to everything
    for known, owner in (("LORA", "lora"), ("IA3", "ia3")):
        assert kinds.of(parse_config(json.dumps({"peft_type": known}).encode(), "x")).name == owner
    with pytest.raises(UnsupportedFeature, match="peft_type=HIRA is not served"):
        kinds.of(parse_config(b'{"peft_type": "HIRA"}', "x"))


def test_several_distributions_and_several_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "a", monkeypatch, "loraplex_shifted", NEW_TYPE, "SHIFTED = loraplex_shifted:KIND")
    install(tmp_path / "b", monkeypatch, "loraplex_beft", example(), "BEFT = loraplex_beft:KIND")
    kinds = find_kinds()
    assert [(each.peft_type, each.kind.name) for each in kinds.installed] == [("BEFT", "beft"), ("SHIFTED", "shifted")]
    assert kinds.also_known == {"BEFT", "SHIFTED"}


BROKEN: dict[str, tuple[str, str, str]] = {
    "an import that fails": ("import not_there_at_all", "X = {}:KIND", "cannot be loaded: ModuleNotFoundError"),
    "an import that raises": ("raise RuntimeError('no')", "X = {}:KIND", "cannot be loaded: RuntimeError: no"),
    "no such object": ("", "X = {}:KIND", "cannot be loaded: AttributeError"),
    "no kind": ("KIND = 7", "X = {}:KIND", "7 is no AdapterKind"),
    "a class": (NEW_TYPE, "X = {}:BeftKind", "is no AdapterKind: an object with name, keys, matches and lower"),
    "without lower": (NEW_TYPE.replace("def lower", "def raise_"), "X = {}:KIND", "is no AdapterKind"),
    "a name that is taken": (
        NEW_TYPE.replace('"shifted"', '"lora"'),
        "X = {}:KIND",
        "'lora' is taken by Loraplex itself",
    ),
    "a name that is none": (NEW_TYPE.replace('"shifted"', '"My Kind"'), "X = {}:KIND", "its kind's name is 'My Kind'"),
    "no name": (NEW_TYPE.replace('"shifted"', "None"), "X = {}:KIND", "its kind's name is None"),
    "a type in small letters": (NEW_TYPE, "shifted = {}:KIND", "'shifted' is no peft_type"),
    "keys without the common ones": (NEW_TYPE.replace("**COMMON_KEYS,", ""), "X = {}:KIND", "lack auto_mapping, base"),
    "keys that are no rules": (NEW_TYPE.replace("served(),", "1,"), "X = {}:KIND", "keys are not a KeyRule for each"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kind_refuses_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source, point, message = BROKEN[name]
    module = "broken_" + re.sub(r"\W", "_", name)
    install(tmp_path / "site", monkeypatch, module, source, point.format(module))
    with pytest.raises(InvalidConfig) as caught:
        find_kinds()
    assert message in str(caught.value)
    assert f"of {module.replace('_', '-')} 1.0 in group loraplex.adapter_kinds: " in str(caught.value)
    assert f"({module}:" in str(caught.value)


def test_two_kinds_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("first", "second")):
        install(tmp_path / name, monkeypatch, f"twin_{name}", NEW_TYPE, f"X{number} = twin_{name}:KIND")
    with pytest.raises(
        InvalidConfig, match=r"twin-second 1\.0 .*: its kind's name 'shifted' is taken by twin-first 1\.0"
    ):
        find_kinds()


@dataclass(frozen=True)
class Answering:
    """A kind that has one answer to everything."""

    answer: Lowered
    name: str = "answering"

    @property
    def keys(self) -> KeyRules:
        return {**COMMON_KEYS, "target_modules": served()}

    def matches(self, config: AdapterConfig) -> bool:
        return True

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        files.tensors.take("x")
        return self.answer


Q0, NORM, EMBED = "model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens"
#: what a kind may not answer on a llama of hidden size 32 and 96 tokens
ODD_ANSWERS: dict[str, tuple[str, SiteDelta, str]] = {
    "no site": ("model.layers.9.q_proj", SiteDelta(shift=torch.ones(32)), "which the model does not have"),
    "nothing": (Q0, SiteDelta(), "a change of nothing"),
    "A": (Q0, SiteDelta(LowRank(torch.ones(2, 33), torch.ones(32, 2), 1.0)), r"A of shape [2, 33]"),
    "B": (Q0, SiteDelta(LowRank(torch.ones(2, 32), torch.ones(32, 3), 1.0)), r"B of shape [32, 3]"),
    "another dtype": (Q0, SiteDelta(LowRank(torch.ones(2, 32).half(), torch.ones(32, 2), 1.0)), "torch.float16 on cpu"),
    "out_scale": (Q0, SiteDelta(out_scale=torch.ones(1, 32)), "out_scale of shape [1, 32]"),
    "in_scale": (Q0, SiteDelta(in_scale=torch.ones(32).double()), "in_scale of shape [32], torch.float64"),
    "shift": (Q0, SiteDelta(shift=torch.ones(32, device="meta")), "shift of shape [32], torch.float32 on meta"),
    "a scaled norm": (NORM, SiteDelta(out_scale=torch.ones(32)), "out scale, but a norm can have nothing but"),
    "a norm": (NORM, SiteDelta(rows=Rows(torch.ones(31))), "own rows of shape [31]"),
    "a matrix": (Q0, SiteDelta(rows=Rows(torch.ones(31, 32))), "own rows of shape [31, 32]"),
    "a bias": (Q0, SiteDelta(rows=Rows(torch.ones(32, 32), bias=torch.ones(31))), "bias of own rows of shape [31]"),
    "tokens": (
        EMBED,
        SiteDelta(rows=Rows(torch.ones(2, 32), torch.tensor([1.0, 2.0]))),
        "indices of own rows of shape",
    ),
    "rows of tokens": (
        EMBED,
        SiteDelta(rows=Rows(torch.ones(3, 32), torch.tensor([1, 2]))),
        "own rows of shape [3, 32]",
    ),
    "a bias that the site has not": (
        Q0,
        SiteDelta(rows=Rows(torch.ones(32, 32), bias=torch.ones(32)), exclusive="a test"),
        "own rows with a bias",
    ),
    "rows to be added up": (NORM, SiteDelta(rows=Rows(torch.ones(32))), "without saying why in SiteDelta.exclusive"),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_answer_that_is_none_is_the_kinds_mistake(tmp_path: Path, name: str) -> None:
    site, delta, message = ODD_ANSWERS[name]
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    path = write_adapter(tmp_path, config, {"base_model.model.x": torch.ones(1)})
    kinds = KindRegistry(built_in=(Answering(Lowered({site: delta})),))
    with pytest.raises(InternalError) as caught:
        load_adapter(any_directory(str(path)), view_of(tiny_model("llama")), max_bytes=MAX_BYTES, kinds=kinds)
    assert str(caught.value).startswith("kind answering: ")
    assert repr(site) in str(caught.value)
    assert message in str(caught.value)


def test_an_engine_does_not_start_with_a_broken_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = tiny_checkpoint(tmp_path, "llama")
    install(tmp_path / "site", monkeypatch, "broken_start", "KIND = 7", "BEFT = broken_start:KIND")
    with pytest.raises(InvalidConfig, match=r"'BEFT' \(broken_start:KIND\) of broken-start 1\.0"):
        local_engine(base, adapter_dirs=(tmp_path,))
