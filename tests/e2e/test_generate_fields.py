"""Every field of a GenerateRequest through a real server: prompts, sampling, stops, output; unary and streamed."""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex_client import Client, InvalidArgument, Message, Params, Result
from tests.engines import make_adapters
from tests.servers import Serving, command, environment, serve, tiny_base

PLAIN = Params(max_tokens=24, ignore_eos=True, token_ids=True)
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fields")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    return make_adapters(tiny_base(root), root / "adapters", ("all", "one"))


@pytest.fixture(scope="module")
def server(root: Path, adapters: dict[str, Path]) -> Iterator[Serving]:
    with serve(tiny_base(root), root / "log", "--adapter-dir", str(root / "adapters")) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(server: Serving, adapters: dict[str, Path]) -> Iterator[Client]:
    with Client(server.address) as client:
        client.load_adapter("a", str(adapters["all"]))
        yield client


def streamed(client: Client, prompt: str, params: Params) -> tuple[str, tuple[int, ...], str]:
    chunks = list(client.stream(prompt, params, timeout=20))
    assert all(chunk.finish_reason == "" and chunk.usage is None for chunk in chunks[:-1])
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    return "".join(chunk.text for chunk in chunks), ids, chunks[-1].finish_reason


def whole(result: Result) -> tuple[str, tuple[int, ...], str]:
    return result.text, result.token_ids, result.finish_reason


def test_text_token_ids_and_chat_are_one_prompt(client: Client) -> None:
    ids = client.tokenize(TEXT)
    assert client.generate(TEXT, PLAIN).token_ids == client.generate(ids, PLAIN).token_ids
    chat = [Message("user", TEXT), Message("assistant", "jumps"), Message("user", "over")]
    rendered = f"user: {TEXT}\nassistant: jumps\nuser: over\nassistant:"
    assert client.tokenize(chat) == client.tokenize(rendered)
    assert client.generate(chat, PLAIN).token_ids == client.generate(rendered, PLAIN).token_ids


SAMPLED = {
    "greedy": PLAIN,
    "temperature": replace(PLAIN, temperature=0.8, seed=7),
    "everything": replace(
        PLAIN,
        temperature=1.3,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=(1 << 64) - 1,
    ),
}


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(client: Client) -> None:
    alone = {name: whole(client.generate(TEXT, params)) for name, params in SAMPLED.items()}
    assert len(set(alone.values())) == len(SAMPLED)
    with ThreadPoolExecutor(12) as pool:
        noise = [
            pool.submit(client.generate, f"{TEXT} {i}", replace(PLAIN, temperature=1.0), adapters="a") for i in range(6)
        ]
        again = {name: pool.submit(streamed, client, TEXT, params) for name, params in SAMPLED.items()}
        assert {name: future.result() for name, future in again.items()} == alone
        for future in noise:
            future.result()
    other = whole(client.generate(TEXT, replace(SAMPLED["temperature"], seed=8)))
    assert other != alone["temperature"]


def test_logprobs(client: Client) -> None:
    result = client.generate(TEXT, replace(PLAIN, logprobs=5, prompt_logprobs=True))
    assert len(result.logprobs) == 24
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0].token_id, "greedy takes the most likely token"
        assert entry.logprob == pytest.approx(entry.top[0].logprob)
        assert len(entry.top) == 5
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(entry.top))
        assert 0 < sum(math.exp(top.logprob) for top in entry.top) <= 1.0001
    prompt = client.tokenize(TEXT)
    assert [entry.token_id for entry in result.prompt_logprobs] == list(prompt[1:])
    assert not client.generate(TEXT, PLAIN).logprobs


def test_stops(client: Client) -> None:
    full = client.generate(TEXT, PLAIN)
    assert (full.finish_reason, full.usage.completion_tokens) == ("length", 24)
    token = next(t for i, t in enumerate(full.token_ids) if i >= 4 and t not in full.token_ids[:i])
    at = full.token_ids.index(token)
    stopped = client.generate(TEXT, replace(PLAIN, stop_token_ids=[token]))
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", full.token_ids[: at + 1])
    late = client.generate(TEXT, replace(PLAIN, stop_token_ids=[full.token_ids[0]], min_tokens=3))
    assert late.usage.completion_tokens >= 3
    stop = full.text[5:9]
    for include in (False, True):
        params = replace(PLAIN, stop=["never seen", stop], include_stop=include)
        cut = client.generate(TEXT, params)
        end = full.text.index(stop) + (len(stop) if include else 0)
        assert (cut.finish_reason, cut.text) == ("stop", full.text[:end])
        assert streamed(client, TEXT, params) == whole(cut)


def test_weights_and_sums(client: Client, adapters: dict[str, Path]) -> None:
    client.load_adapter("b", str(adapters["one"]))
    base, a = client.generate(TEXT, PLAIN), client.generate(TEXT, PLAIN, adapters="a")
    assert base.token_ids != a.token_ids
    assert client.generate(TEXT, PLAIN, adapters={"a": 0.0}).token_ids == base.token_ids
    assert client.generate(TEXT, PLAIN, adapters={"a": 1.0, "b": 0.0}).token_ids == a.token_ids
    both = client.generate(TEXT, PLAIN, adapters={"a": 0.5, "b": 2.0})
    assert [(use.name, use.weight) for use in both.adapters] == [("a", 0.5), ("b", 2.0)]
    assert all(use.uid for use in both.adapters)
    client.unload_adapter("b")


def test_bad_chats_and_texts_to_tokenize(client: Client) -> None:
    for prompt, field in ((" " * 0, "text"), ([Message("", "x")], "chat.messages.role")):
        with pytest.raises(InvalidArgument) as caught:
            client.tokenize(prompt)
        assert caught.value.field == field


def test_the_command_line_loads_a_relative_directory_and_streams(
    client: Client, server: Serving, adapters: dict[str, Path], root: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [*arguments, "--server", server.address]
        return subprocess.run(
            command(*argv), capture_output=True, text=True, timeout=60, env=environment(), cwd=root / "adapters" / "all"
        )

    loaded = run("adapters", "load", "here", "../one")
    assert loaded.returncode == 0, loaded.stderr
    assert client.get_adapter("here").source == str(root / "adapters" / "all" / ".." / "one")
    answer = run("generate", "--adapter", "here", "--max-tokens", "5", TEXT)
    text = client.generate(TEXT, Params(max_tokens=5), adapters="here").text
    assert answer.stdout == text.replace("\r", "\n") + "\n", "as subprocess reads it"
    refused = run("generate", "--adapter", "hear", TEXT)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "loraplex: adapter 'hear' is not loaded; did you mean here?\n"
    client.unload_adapter("here")
