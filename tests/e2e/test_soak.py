"""Adapters of every sort under load that cancels, times out, loads, replaces, unloads and is short of memory, all at
once over gRPC: every answer is the one that its adapter gives alone, and an idle server holds what it held before."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import pytest
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from loraplex_client import AlreadyExists, Client, DeadlineExceeded, FailedPrecondition, NotFound, Params, ServerError
from tests.own_text import VOCAB_SIZE, chat_base, ship_tokenizer
from tests.peft_kinds import Recipe, save
from tests.servers import Serving, serve, until
from tests.tiny import ALL_LINEAR

#: set to a number of seconds for a longer run
SOAK_S: Final = float(os.environ.get("LORAPLEX_SOAK_S", "3"))
CLIENTS: Final = 6
INVOCATION: Final = (31, 32, 33)
SHORT: Final = Params(max_tokens=6, ignore_eos=True, token_ids=True)
LONG: Final = Params(max_tokens=2000, ignore_eos=True, token_ids=True)
#: room for some of the adapters at a time, and not for two of those with an own head beside the others
ADAPTER_MEMORY: Final = "120KiB"
#: what a request may use; the last ones are sums
MIXES: Final[tuple[Mapping[str, float], ...]] = (
    {},
    *(
        {name: 1.0}
        for name in ("lora", "dora", "ia3", "norms", "head", "twin", "alora", "loha", "vera", "added", "own")
    ),
    {"lora": 0.5, "loha": -0.5},
    {"lora": 1.5, "head": 1.0},
    {"vera": 0.7, "ia3": 1.0},
    {"alora": 1.0, "norms": 1.0},
)
PROMPTS: Final = tuple(
    (*range(5, 5 + length), *middle, *range(60, 60 + length)) for length in (3, 40) for middle in ((), INVOCATION)
)


def _lora(**config: object) -> Recipe:
    defaults = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return Recipe(lambda: LoraConfig(**{**defaults, **config}))  # type: ignore[arg-type]


RECIPES: Final = {
    "lora": _lora(target_modules=list(ALL_LINEAR), r=4),
    "dora": _lora(use_dora=True),
    "ia3": Recipe(lambda: IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])),
    "norms": Recipe(lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "head": _lora(modules_to_save=["lm_head"]),
    "alora": _lora(alora_invocation_tokens=list(INVOCATION)),
    "loha": Recipe(lambda: LoHaConfig(r=2, target_modules=["o_proj", "down_proj"]), strength=0.6, factors=4),
    "vera": Recipe(lambda: VeraConfig(r=8, target_modules=["q_proj"]), strength=0.8),
    "added": Recipe(_lora(trainable_token_indices=[VOCAB_SIZE, VOCAB_SIZE + 1]).config, vocab_size=VOCAB_SIZE + 2),
}


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the two processes have of the system."""

    threads: int
    descriptors: int
    resident: int
    files: int

    @classmethod
    def of(cls, server: Serving) -> Holdings:
        front = psutil.Process(server.process.pid)
        both = [front, *front.children()]
        sockets = {str(connection.laddr) for each in both for connection in each.net_connections("unix")}
        directories = {Path(name).parent for name in sockets if name.endswith("/engine")}
        return cls(
            sum(each.num_threads() for each in both),
            sum(each.num_fds() for each in both),
            sum(each.memory_info().rss for each in both),
            sum(path.is_file() for directory in directories for path in directory.rglob("*")),
        )


@dataclass(slots=True)
class Soak:
    """Clients that do whatever they may until ``stop``; ``wrong`` is what none of them should have seen."""

    address: str
    sources: Mapping[str, Path]
    expected: Mapping[tuple[int, int], tuple[int, ...]]
    stop: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[object] = field(default_factory=list)

    def ask(self, seed: int) -> None:
        """Requests that are read to the end, given up, or run out of time."""
        rng = random.Random(seed)
        with Client(self.address) as client:
            while not self.stop.is_set():
                mix, prompt = rng.randrange(len(MIXES)), rng.randrange(len(PROMPTS))
                what = rng.choice(("whole", "whole", "whole", "cancel", "deadline", "whole"))
                try:
                    getattr(self, f"_{what}")(client, mix, prompt, rng)
                    self.done[what] += 1
                except DeadlineExceeded:
                    self.done["deadline"] += 1
                    if what != "deadline":
                        self.wrong.append((what, MIXES[mix], "a deadline that nobody set"))
                except NotFound:
                    self.done["not there"] += 1  # it is being unloaded and loaded again
                except Exception as error:
                    self.wrong.append((what, MIXES[mix], repr(error)))

    def _whole(self, client: Client, mix: int, prompt: int, rng: random.Random) -> None:
        chunks = list(client.stream(PROMPTS[prompt], SHORT, adapters=dict(MIXES[mix]), timeout=60.0))
        tokens = tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks))
        if tokens != self.expected[mix, prompt]:
            self.wrong.append(("tokens", MIXES[mix], prompt, tokens))

    def _cancel(self, client: Client, mix: int, prompt: int, rng: random.Random) -> None:
        stream = client.stream(PROMPTS[prompt], LONG, adapters=dict(MIXES[mix]))
        for _ in range(rng.randint(0, 5)):
            next(stream)
        stream.close()

    def _deadline(self, client: Client, mix: int, prompt: int, rng: random.Random) -> None:
        list(client.stream(PROMPTS[prompt], LONG, adapters=dict(MIXES[mix]), timeout=rng.uniform(0.001, 0.2)))
        self.wrong.append(("deadline", MIXES[mix], "it was not kept"))

    def change(self, seed: int) -> None:
        """Loads, replacements by the same, unloads: what is served under a name is always the same."""
        rng = random.Random(seed)
        with Client(self.address) as client:
            while not self.stop.is_set():
                name = rng.choice(sorted(self.sources))
                try:
                    if rng.random() < 0.5:
                        client.unload_adapter(name, timeout=60.0)
                        self.done["unload"] += 1
                    client.load_adapter(name, str(self.sources[name]), replace=True, timeout=60.0)
                    self.done["load"] += 1
                    if rng.random() < 0.3:
                        client.load_adapter("bad", str(self.sources[name].parent / "bad"), timeout=60.0)
                        self.wrong.append("a bad adapter was loaded")
                except (AlreadyExists, FailedPrecondition, NotFound):
                    self.done["crossed"] += 1  # another client was faster
                except ServerError as error:
                    if "bad" not in str(error):
                        self.wrong.append((name, repr(error)))
                    self.done["refused"] += 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    # so many positions that no LONG answer ends within any deadline that is set, however fast the machine is
    return chat_base(root, tie_word_embeddings=False, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def sources(root: Path, base: Path) -> dict[str, Path]:
    made = {
        name: save(recipe, base, root / "adapters" / name, seed=seed)
        for seed, (name, recipe) in enumerate(RECIPES.items())
    }
    for name, like in (("twin", "head"), ("own", "lora")):
        made[name] = save(RECIPES[like], base, root / "adapters" / name, seed=len(name))
    head = "base_model.model.lm_head.weight"
    _share(made["head"], made["twin"], head)
    ship_tokenizer(base, made["own"], ["<tool>", "<x>"])
    bad = root / "adapters" / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (bad / "adapter_model.safetensors").write_bytes(b"\x00" * 7)
    return made


def _share(one: Path, other: Path, name: str) -> None:
    """The other adapter gets the one's tensor of this name: equal content, held once."""
    file = "adapter_model.safetensors"
    save_file({**load_file(other / file), name: load_file(one / file)[name]}, other / file)


@pytest.fixture(scope="module")
def server(root: Path, base: Path, sources: dict[str, Path]) -> Iterator[Serving]:
    loaded = [f"--adapter={name}={path}" for name, path in sources.items()]
    flags = ("--adapter-dir", str(root / "adapters"), "--adapter-memory", ADAPTER_MEMORY, "--max-num-seqs", "8")
    with serve(base, root / "log", *flags, *loaded) as serving:
        yield serving


def _idle(server: Serving, client: Client) -> bool:
    return not any(
        (
            server.value("loraplex_kv_pages", state="used"),
            server.value("loraplex_requests_running"),
            server.value("loraplex_requests_waiting"),
            sum(adapter.in_flight for adapter in client.list_adapters()),
        )
    )


def _soak(
    server: Serving,
    sources: Mapping[str, Path],
    expected: Mapping[tuple[int, int], tuple[int, ...]],
    seconds: float = SOAK_S,
) -> Soak:
    soak = Soak(server.address, sources, expected)
    with ThreadPoolExecutor(CLIENTS + 2) as pool:
        futures = [pool.submit(soak.ask, seed) for seed in range(CLIENTS)]
        futures += [pool.submit(soak.change, seed) for seed in (100, 101)]
        time.sleep(seconds)
        soak.stop.set()
        for future in futures:
            future.result(timeout=90.0)
    return soak


@pytest.mark.timeout(240)
def test_everything_at_once(server: Serving, sources: dict[str, Path]) -> None:
    with Client(server.address) as client:
        expected = {
            (mix, prompt): client.generate(PROMPTS[prompt], SHORT, adapters=dict(MIXES[mix])).token_ids
            for mix in range(len(MIXES))
            for prompt in range(len(PROMPTS))
        }
        assert len({expected[mix, 3] for mix in range(len(MIXES))}) >= len(MIXES) - 2, "adapters that show"
        _soak(server, sources, expected, seconds=min(SOAK_S, 1.0))  # what is made once is there from here on
        until(lambda: _idle(server, client), timeout_s=20.0)
        before = Holdings.of(server)
        soak = _soak(server, sources, expected)
        assert soak.wrong == []
        assert all(soak.done[what] for what in ("whole", "cancel", "deadline", "load", "unload", "refused")), soak.done
        until(lambda: _idle(server, client), timeout_s=20.0)
        for name, source in sources.items():
            client.load_adapter(name, str(source), replace=True)
        assert {
            (mix, prompt): client.generate(PROMPTS[prompt], SHORT, adapters=dict(MIXES[mix])).token_ids
            for mix, prompt in expected
        } == expected
        assert server.value("loraplex_adapter_evictions_total", tier="device") > 0
        for name in sources:
            client.unload_adapter(name)
        until(lambda: _idle(server, client), timeout_s=20.0)
    after = Holdings.of(server)
    assert "Traceback" not in server.log
    until(lambda: not any(server.value("loraplex_adapter_bytes", tier=tier) for tier in ("device", "host")))
    assert after.threads <= before.threads + 2
    assert after.descriptors <= before.descriptors + 8
    assert after.resident < before.resident + (64 << 20)
    assert after.files <= 1
