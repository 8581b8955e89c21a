"""Activated LoRA on a real server: its metrics show prompt tokens that adapters share, its answers who was invoked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_client import Client, InvalidArgument, Params
from tests.alora_oracle import AloraOracle
from tests.oracle import make_adapter
from tests.servers import Serving, serve, tiny_base, until

PARAMS = Params(max_tokens=6, ignore_eos=True, token_ids=True)
INVOCATIONS = {"summary": (31, 32, 33), "check": (41, 42)}
#: 62 pages of 16 and a token
DOCUMENT = tuple(5 + index * 7 % 250 for index in range(993))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activated-serving")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    made = {}
    for seed, (name, tokens) in enumerate(INVOCATIONS.items()):
        made[name] = make_adapter(
            tiny_base(root),
            root / "adapters" / name,
            seed=seed,
            r=4 + 4 * seed,
            target_modules=["q_proj", "v_proj", "up_proj"],
            alora_invocation_tokens=list(tokens),
            task_type="CAUSAL_LM",
        )
    return made


@pytest.fixture(scope="module")
def server(root: Path, adapters: dict[str, Path]) -> Iterator[Serving]:
    with serve(tiny_base(root), root / "server.log", "--adapter-dir", str(root / "adapters")) as serving:
        with Client(serving.address) as client:
            for name, path in adapters.items():
                loaded = client.load_adapter(name, str(path))
                assert (loaded.kind, loaded.invocation_tokens) == ("alora", INVOCATIONS[name])
        yield serving


def test_two_adapters_share_the_prompt_with_the_base(
    root: Path, adapters: dict[str, Path], server: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = AloraOracle(tiny_base(root), adapters)
    times = {}
    with Client(server.address) as client:
        first = client.generate((*DOCUMENT, 9), PARAMS)
        assert first.usage.cached_prompt_tokens == 0
        times["base, cold"] = first.usage.ttft_s
        for name, invocation in INVOCATIONS.items():
            prompt = DOCUMENT + invocation
            answer = client.generate(prompt, PARAMS, adapters=name)
            assert list(answer.token_ids) == oracle.generated(name, prompt, PARAMS.max_tokens)
            assert answer.usage.cached_prompt_tokens == 992
            assert [(use.name, use.invoked) for use in answer.adapters] == [(name, True)]
            times[name] = answer.usage.ttft_s
    until(lambda: cached(server, "check") > 0)
    assert {name: cached(server, name) for name in ("base", *INVOCATIONS)} == {"base": 0, "summary": 992, "check": 992}
    with capsys.disabled():
        print("\ntime to first token over gRPC: " + ", ".join(f"{n} {t * 1000:.1f} ms" for n, t in times.items()))


def test_an_answer_says_who_was_not_invoked(server: Serving) -> None:
    with Client(server.address) as client:
        want = client.generate(DOCUMENT[:20], PARAMS).token_ids
        answer = client.generate(DOCUMENT[:20], PARAMS, adapters=["summary", "check"])
        assert answer.token_ids == want
        assert [(use.name, use.invoked) for use in answer.adapters] == [("summary", False), ("check", False)]
        chunks = list(client.stream((*DOCUMENT[:20], 41, 42), PARAMS, adapters=["summary", "check"]))
        assert [(use.name, use.invoked) for use in chunks[0].adapters] == [("summary", False), ("check", True)]


def test_invocation_tokens_past_the_vocabulary_are_refused(root: Path, server: Serving) -> None:
    source = make_adapter(
        tiny_base(root),
        root / "adapters" / "strange",
        seed=9,
        target_modules=["q_proj"],
        alora_invocation_tokens=[31, 300],
        task_type="CAUSAL_LM",
    )
    with Client(server.address) as client:
        with pytest.raises(
            InvalidArgument, match="alora_invocation_tokens has 300; the model's vocabulary is 0 to 299"
        ):
            client.load_adapter("strange", str(source))
        assert {adapter.name for adapter in client.list_adapters()} == set(INVOCATIONS)


def cached(server: Serving, adapter: str) -> float:
    return server.value("loraplex_cached_prompt_tokens_total", adapter=adapter)
