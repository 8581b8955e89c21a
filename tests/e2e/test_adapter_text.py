"""Adapters with tokenizers, templates and generation settings of their own, through a real server.

The oracle is transformers' tokenizer of the adapter's directory, its ``apply_chat_template``, and PEFT.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraplex_client import Client, FailedPrecondition, InvalidArgument, Message, NotFound, Params
from tests.oracle import Oracle, make_adapter
from tests.own_text import CHAT, chat_base, own_template, ship_generation, ship_tokenizer
from tests.servers import Serving, serve

PARAMS = Params(max_tokens=10, ignore_eos=True, token_ids=True)
MESSAGES = [Message(turn["role"], turn["content"]) for turn in CHAT]
TEXT = "the quick <tool> fox <end>"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]}
MANY = 50


@dataclass(frozen=True)
class Shipped:
    """An adapter, and transformers' tokenizer of its directory."""

    path: Path
    tokenizer: Any

    def chat(self) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter-text")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return chat_base(root)


@pytest.fixture(scope="module")
def three(root: Path, base: Path) -> dict[str, Shipped]:
    """Added tokens in different places, so that one id is another token for each; two end at a token of their own."""
    tokens = {"a": ["<tool>", "<x>"], "b": ["<y>", "<z>", "<tool>"], "c": ["<z>"]}
    shipped = {}
    for seed, name in enumerate(tokens):
        path = make_adapter(base, root / "adapters" / name, seed=seed, **LORA)
        named = {"eos_token": "<end>"} if name != "c" else {}
        shipped[name] = Shipped(
            path, ship_tokenizer(base, path, tokens[name], template=own_template(f"<{name}>"), **named)
        )
    return shipped


@pytest.fixture(scope="module")
def oracle(base: Path, three: dict[str, Shipped]) -> Oracle:
    return Oracle(base, {name: shipped.path for name, shipped in three.items()})


@pytest.fixture(scope="module")
def server(root: Path, base: Path, three: dict[str, Shipped]) -> Iterator[Serving]:
    flags = ("--adapter-dir", str(root / "adapters"), "--allow-adapter-templates")
    with serve(base, root / "log", *flags) as serving:
        yield serving


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    """Everything that a test loads is gone after it."""
    with Client(server.address) as client:
        yield client
        for adapter in client.list_adapters():
            client.unload_adapter(adapter.name)
        assert spooled(server) == set(), "text of adapters that are gone was left behind"


def spooled(server: Serving) -> set[str]:
    """The files of adapters' text in the server's run directory."""
    [engine] = psutil.Process(server.process.pid).children()
    [address] = {
        connection.laddr
        for connection in engine.net_connections("unix")
        if "/loraplex-" in str(connection.laddr) and str(connection.laddr).endswith("/engine")
    }
    directory = Path(str(address)).parent / "text"
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def test_text_and_chat_equal_transformers_and_peft_in_a_mixed_batch(
    client: Client, server: Serving, three: dict[str, Shipped], oracle: Oracle
) -> None:
    for name, shipped in three.items():
        adapter = client.load_adapter(name, str(shipped.path))
        assert adapter.tokenizer is not None
        assert (adapter.tokenizer.own, adapter.tokenizer.chat_template) == (True, True)
    assert len(spooled(server)) == len(three)
    wanted: list[tuple[str, str | list[Message], list[int]]] = []
    for name, shipped in three.items():
        wanted += [(name, MESSAGES, shipped.chat()), (name, TEXT, shipped.tokenizer(TEXT)["input_ids"])]
    assert len({tuple(ids) for _, _, ids in wanted}) == len(wanted), "the tokenizers do not differ"
    with ThreadPoolExecutor(len(wanted)) as threads:
        results = list(threads.map(lambda w: client.generate(w[1], PARAMS, adapters=w[0]), wanted))
    for (name, prompt, ids), result in zip(wanted, results, strict=True):
        assert client.tokenize(prompt, adapters=name) == tuple(ids)
        assert list(result.token_ids) == oracle.greedy(name, ids, 10)
        assert result.text == three[name].tokenizer.decode(result.token_ids, skip_special_tokens=True)
    streamed = list(client.stream(TEXT, PARAMS, adapters="a"))
    assert "".join(chunk.text for chunk in streamed) == results[1].text


def test_generation_ends_at_the_adapter_s_own_tokens(
    client: Client, base: Path, root: Path, three: dict[str, Shipped], oracle: Oracle
) -> None:
    shipped = three["a"]
    tokens = oracle.greedy("a", shipped.tokenizer(TEXT)["input_ids"], 10)
    last = next(index for index in range(2, 10) if tokens[index] not in tokens[:index])
    path = root / "adapters" / "stops"
    shutil.copytree(shipped.path, path)
    ship_generation(path, eos_token_id=[tokens[last]], do_sample=True, temperature=0.7, top_k=5)
    adapter = client.load_adapter("stops", str(path))
    assert adapter.profile is not None
    assert adapter.profile.stop_token_ids == (tokens[last],)
    assert adapter.profile.sampling is not None
    assert (adapter.profile.sampling.temperature, adapter.profile.sampling.top_k) == (pytest.approx(0.7), 5)
    result = client.generate(TEXT, Params(max_tokens=10, token_ids=True), adapters="stops")
    assert (list(result.token_ids), result.finish_reason) == (tokens[: last + 1], "stop")
    assert result.text == shipped.tokenizer.decode(tokens[:last], skip_special_tokens=True)
    later = client.generate(TEXT, Params(max_tokens=10, token_ids=True, min_tokens=last + 2), adapters="stops")
    assert tokens[last] not in later.token_ids[: last + 1]


def test_sampling_defaults_are_for_requests_that_set_none(
    client: Client, root: Path, three: dict[str, Shipped], oracle: Oracle
) -> None:
    path = root / "adapters" / "samples"
    shutil.copytree(three["c"].path, path)
    ship_generation(path, do_sample=True, temperature=5.0, top_k=0)
    client.load_adapter("samples", str(path))
    greedy = oracle.greedy("c", three["c"].tokenizer(TEXT)["input_ids"], 10)
    assert list(client.generate(TEXT, PARAMS, adapters="samples").token_ids) == greedy
    own = Params(max_tokens=10, ignore_eos=True, token_ids=True, adapter_sampling=True)
    assert len({client.generate(TEXT, own, adapters="samples").token_ids for _ in range(4)}) > 1
    assert client.generate(TEXT, own).token_ids == client.generate(TEXT, PARAMS).token_ids


def test_fifty_tokenizers_side_by_side(client: Client, server: Serving, base: Path, root: Path) -> None:
    first = make_adapter(base, root / "adapters" / "many", seed=9, **LORA)
    shipped = {}
    for index in range(MANY):
        path = root / "adapters" / f"many-{index}"
        shutil.copytree(first, path)
        tokens = [f"<filler{i}>" for i in range(index)] + ["<tool>"]
        template = own_template(f"<{index}>")
        shipped[f"m{index}"] = Shipped(path, ship_tokenizer(base, path, tokens, template=template))
    uids = {client.load_adapter(name, str(one.path)).uid for name, one in shipped.items()}
    assert len(uids) == MANY, "equal weights with different text are one adapter"
    assert len(spooled(server)) == MANY
    oracle = Oracle(base, {"m": first})
    with ThreadPoolExecutor(MANY) as threads:
        results = list(threads.map(lambda name: client.generate(MESSAGES, PARAMS, adapters=name), shipped))
    for one, result in zip(shipped.values(), results, strict=True):
        assert result.usage is not None
        assert result.usage.prompt_tokens == len(one.chat())
        assert list(result.token_ids) == oracle.greedy("m", one.chat(), 10)
        assert result.text == one.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert len({tuple(one.chat()) for one in shipped.values()}) == MANY


def test_a_source_may_vanish_once_it_was_loaded(client: Client, root: Path, three: dict[str, Shipped]) -> None:
    path = root / "adapters" / "vanishes"
    shutil.copytree(three["b"].path, path)
    client.load_adapter("b", str(path))
    shutil.rmtree(path)
    assert client.tokenize(MESSAGES, adapters="b") == tuple(three["b"].chat())


def test_replacing_under_load_never_mixes_tokenizers(client: Client, three: dict[str, Shipped], oracle: Oracle) -> None:
    """Every answer is that of one version, whole: its prompt, its tokens, its text."""
    answers = {}
    for name in ("a", "b"):
        ids = three[name].chat()
        tokens = oracle.greedy(name, ids, 10)
        answers[len(ids), tuple(tokens)] = three[name].tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(answers) == 2
    client.load_adapter("x", str(three["a"].path))
    over, failures, seen = threading.Event(), [], set()

    def ask() -> None:
        while not over.is_set():
            result = client.generate(MESSAGES, PARAMS, adapters="x")
            assert result.usage is not None
            seen.add(result.token_ids)
            if answers.get((result.usage.prompt_tokens, result.token_ids)) != result.text:
                failures.append(result)

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        try:
            for turn in range(40):
                client.load_adapter("x", str(three["b" if turn % 2 == 0 else "a"].path), replace=True)
        finally:
            over.set()
        for future in asking:
            future.result()
    assert failures == []
    assert len(seen) == 2, "only one version was asked"


def test_requests_that_come_while_their_adapter_loads(
    client: Client, three: dict[str, Shipped], oracle: Oracle
) -> None:
    ids = three["a"].chat()
    with ThreadPoolExecutor(8) as threads:
        loading = threads.submit(client.load_adapter, "late", str(three["a"].path))
        results = []
        while not loading.done() or len(results) < 4:
            try:
                results.append(client.generate(MESSAGES, PARAMS, adapters="late"))
            except NotFound:
                continue
    expected = oracle.greedy("a", ids, 10)
    assert all(list(result.token_ids) == expected for result in results)


def test_refusals_leave_nothing(
    client: Client, server: Serving, base: Path, root: Path, three: dict[str, Shipped]
) -> None:
    client.load_adapter("a", str(three["a"].path))
    client.load_adapter("b", str(three["b"].path))
    with pytest.raises(InvalidArgument, match="'a', 'b' ship different tokenizers"):
        client.generate(TEXT, PARAMS, adapters=("a", "b"))
    with pytest.raises(NotFound):
        client.tokenize(TEXT, adapters="nobody")
    path = root / "adapters" / "past"
    shutil.copytree(three["c"].path, path)
    ship_tokenizer(base, path, [f"<{index}>" for index in range(100)])
    with pytest.raises(FailedPrecondition, match="past the vocabulary of 400 tokens"):
        client.load_adapter("past", str(path))
    assert len(spooled(server)) == 2
    client.unload_adapter("a")
    assert len(spooled(server)) == 1
    with pytest.raises(NotFound):
        client.generate(TEXT, PARAMS, adapters="a")
    assert client.tokenize(TEXT, adapters="b") == tuple(three["b"].tokenizer(TEXT)["input_ids"])


def test_templates_only_where_the_operator_allows_them(root: Path, base: Path, three: dict[str, Shipped]) -> None:
    with (
        serve(base, root / "log-plain", "--adapter-dir", str(root / "adapters")) as serving,
        Client(serving.address) as client,
    ):
        adapter = client.load_adapter("a", str(three["a"].path))
        assert adapter.tokenizer is not None
        assert (adapter.tokenizer.own, adapter.tokenizer.chat_template) == (True, False)
        tokenizer = three["a"].tokenizer
        rendered = tokenizer.apply_chat_template(
            CHAT, chat_template=(base / "chat_template.jinja").read_text(), add_generation_prompt=True
        )
        assert client.tokenize(MESSAGES, adapters="a") == tuple(rendered["input_ids"])
        assert client.tokenize(MESSAGES, adapters="a") != client.tokenize(MESSAGES), "<tool> is one token of its own"


def test_tokens_past_the_base_s_vocabulary(client: Client, base: Path, root: Path) -> None:
    """Fifty added tokens are more than the model has rows to spare: the adapter saves a larger embedding and head."""
    path = root / "adapters" / "larger"
    path.mkdir()
    tokens = [f"<new{index}>" for index in range(90)]
    tokenizer = ship_tokenizer(base, path, tokens, template=own_template("<new89>"), eos_token="<end>")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if "modules_to_save" in name:
                parameter[330:].normal_(std=0.4)
    with warnings.catch_warnings():  # PEFT saves a resized embedding whole, and says so
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        peft.save_pretrained(str(path))
    adapter = client.load_adapter("larger", str(path))
    assert adapter.tokenizer is not None
    assert adapter.tokenizer.vocab_size == len(tokenizer) == 421
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert max(ids) == tokenizer.convert_tokens_to_ids("<end>") == 420
    expected = peft.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    result = client.generate(MESSAGES, PARAMS, adapters="larger")
    assert list(result.token_ids) == expected
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(InvalidArgument, match="token id 420 is outside the vocabulary; allowed are 0 to 399"):
        client.generate([420], PARAMS)
