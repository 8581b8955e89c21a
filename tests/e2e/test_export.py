"""Exports through a real server: what PEFT, transformers and the server itself make of them, and what ends them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from loraplex.adapters.exporting.destination import MARKER
from loraplex_client import (
    AlreadyExists,
    Client,
    InvalidArgument,
    MergeOptions,
    Message,
    NotFound,
    Params,
    PermissionDenied,
    ServerError,
    Unavailable,
)
from tests.exported import loaded
from tests.oracle import Alone, make_adapter
from tests.own_text import CHAT, chat_base, own_template, ship_generation, ship_tokenizer
from tests.servers import Serving, command, environment, serve, until

PARAMS = Params(max_tokens=8, ignore_eos=True, token_ids=True)
PROMPT = "the quick brown fox"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return chat_base(root)


@pytest.fixture(scope="module")
def server(root: Path, base: Path) -> Iterator[Serving]:
    for seed, name in enumerate(("plain", "own")):
        make_adapter(base, root / "adapters" / name, seed=seed, **LORA)
    ship_tokenizer(base, root / "adapters" / "own", [], template=own_template("own"))
    ship_generation(root / "adapters" / "own", eos_token_id=7, do_sample=False)
    (root / "exports").mkdir()
    flags = ["--adapter-dir", str(root), "--export-dir", str(root / "exports"), "--allow-adapter-templates"]
    with serve(base, root / "log", *flags) as serving:
        with Client(serving.address) as client:
            for name in ("plain", "own"):
                client.load_adapter(name, str(root / "adapters" / name))
        yield serving


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_the_base_with_an_adapter_in_it_answers_as_the_server_does(client: Client, root: Path, base: Path) -> None:
    answer = client.generate(PROMPT, PARAMS, adapters="plain")
    *_, last = client.export_adapter("plain", "plain-merged", format="merged")
    assert (last.stage, last.destination) == ("done", str(root / "exports" / "plain-merged"))
    path = Path(last.destination)
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > last.total_bytes > 0
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT)["input_ids"]
    assert ids == list(client.tokenize(PROMPT))
    assert Alone(loaded(path)).greedy(ids, 8) == list(answer.token_ids)
    assert (path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not list((root / "exports").glob("*.partial"))


def test_a_quantized_one_says_what_it_lost_and_one_that_cannot_be_leaves_nothing(client: Client, root: Path) -> None:
    *_, last = client.export_adapter("plain", "plain-int8", format="merged", quantization="int8")
    assert 0 < last.mean_error < last.largest_error < 0.02
    site = loaded(Path(last.destination)).get_submodule(last.largest_error_site)
    assert type(site).__name__ == "Linear8bitLt"
    with pytest.raises(InvalidArgument, match="32 inputs are no multiple of the 64 of a block of nf4"):
        list(client.export_adapter("plain", "plain-nf4", format="merged", quantization="nf4"))
    assert not list((root / "exports").glob("plain-nf4*"))


def test_an_adapter_with_text_of_its_own_brings_it(client: Client, root: Path) -> None:
    for format in ("peft", "merged"):
        list(client.export_adapter("own", f"own-{format}", format=format))
    messages = [Message(turn["role"], turn["content"]) for turn in CHAT]
    tokenizer = AutoTokenizer.from_pretrained(root / "exports" / "own-merged")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids == list(client.tokenize(messages, adapters="own"))
    answer = client.generate(messages, PARAMS, adapters="own")
    model = loaded(root / "exports" / "own-merged")
    assert Alone(model).greedy(ids, 8) == list(answer.token_ids)
    assert model.generation_config.eos_token_id == [7]
    client.load_adapter("again", str(root / "exports" / "own-peft"))
    assert client.get_adapter("again").uid == client.get_adapter("own").uid


def test_a_merge_is_a_lora_that_is_loaded_as_any_other(server: Serving, client: Client, root: Path) -> None:
    client.merge_adapters("both", {"plain": 0.6, "own": 0.4}, MergeOptions("cat"))
    line = command("adapters", "export", "--server", server.address, "both", str(root / "exports" / "both"))
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:16]) == (0, "both exported to"), done.stderr
    client.load_adapter("both-again", str(root / "exports" / "both"))
    one, other = (client.generate(PROMPT, PARAMS, adapters=name) for name in ("both", "both-again"))
    assert one.token_ids == other.token_ids


def test_a_merge_brings_the_text_that_its_inputs_ship(client: Client, root: Path) -> None:
    """As a LoRA, and in the base; also where the input that ships it is a merge."""
    client.merge_adapters("inner", {"own": 1.0}, MergeOptions("cat"))
    client.merge_adapters("outer", {"plain": 0.6, "inner": 0.4}, MergeOptions("cat"))
    messages = [Message(turn["role"], turn["content"]) for turn in CHAT]
    expected = list(client.tokenize(messages, adapters="own"))
    assert expected != list(client.tokenize(messages, adapters="plain"))
    assert list(client.tokenize(messages, adapters="outer")) == expected
    for format in ("peft", "merged"):
        list(client.export_adapter("outer", f"outer-{format}", format=format))
    client.load_adapter("outer-again", str(root / "exports" / "outer-peft"))
    assert list(client.tokenize(messages, adapters="outer-again")) == expected
    tokenizer = AutoTokenizer.from_pretrained(root / "exports" / "outer-merged")
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == expected
    answers = [client.generate(messages, PARAMS, adapters=name) for name in ("outer", "outer-again")]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize(
    ("name", "destination", "error", "part"),
    [
        ("plain", "/tmp/elsewhere", PermissionDenied, "outside the directories that exports may go to"),
        ("plain", "../adapters/x", PermissionDenied, "outside"),
        ("plain", "taken", AlreadyExists, "exports overwrite nothing"),
        ("plain", "a/b", NotFound, "is no directory"),
        ("plain", "..", InvalidArgument, "no plain name"),
        ("plane", "x", NotFound, "did you mean plain"),
    ],
)
def test_refusals_name_what_is_wrong(
    client: Client, root: Path, name: str, destination: str, error: type[ServerError], part: str
) -> None:
    (root / "exports" / "taken").mkdir(exist_ok=True)
    for format in ("peft", "merged"):
        with pytest.raises(error, match=part):
            list(client.export_adapter(name, destination, format=format))
    assert not list((root / "exports").glob("*.partial"))


def test_an_engine_that_is_killed_ends_its_exports_and_what_it_left_is_taken_away(
    server: Serving, client: Client, root: Path
) -> None:
    left = root / "exports" / "killed.partial"
    left.mkdir()
    (left / MARKER).touch()  # nobody holds it, as when its process is gone
    (left / "model.safetensors").write_bytes(b"half")
    [engine] = psutil.Process(server.process.pid).children()
    engine.suspend()
    told = client.export_adapter("plain", "killed", format="merged")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(list, told)
        with pytest.raises(TimeoutError):
            ended.result(0.3)
        engine.kill()
        with pytest.raises(Unavailable, match="the engine process ended"):
            ended.result(30)
    assert (left / "model.safetensors").is_file()
    until(lambda: _serves(client), timeout_s=60)
    list(client.export_adapter("plain", "killed", format="merged"))
    assert (root / "exports" / "killed" / "config.json").is_file()
    assert not left.exists()


def _serves(client: Client) -> bool:
    try:
        client.get_adapter("plain")
    except ServerError:
        return False
    return True
