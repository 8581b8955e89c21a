"""Several weighted adapters in one request, against every sum that PEFT has (float32).

What equals what: PEFT's ``cat`` of LoRAs always; its ``linear`` of LoRAs only where no two of them meet in a module
(elsewhere it multiplies the sums of the factors, which brings in products of one's A with another's B); its sum of IA3s
where they meet in every module and their weights come to 1 (it sums the vectors, we sum what they change); several
active adapters of one PEFT model where a DoRA is the first (PEFT lets a later one rescale what others have added). Of
kinds that PEFT does not put together: the changes add up that each makes to the base's weights when PEFT merges it
alone, but where one scales a site's input and another its output: these multiply, as when PEFT merges both in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from peft import IA3Config, LoraConfig

from loraplex.engine.local import Generation, LocalEngine
from loraplex.errors import InvalidRequest, LoraplexError
from loraplex.types import MAX_ADAPTERS_PER_REQUEST, AdapterRef, OutputOptions, Request, StopRule, TokenLogprob
from tests.engines import local_engine
from tests.kind_matrix import BASES
from tests.oracle import Alone
from tests.peft_kinds import RECIPES, Recipe, save
from tests.sum_oracle import (
    Parts,
    active_mixed,
    active_together,
    combined,
    combined_ia3,
    merged_changes,
    merged_in_turn,
)
from tests.tiny import prompt, tiny_checkpoint

MAX_TOKENS = 6
#: of a log-probability, in float32
TOLERANCE = 2e-4


def _lora(*targets: str, **config: Any) -> Recipe:
    return Recipe(lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **config}))


def _ia3(*targets: str, feedforward: tuple[str, ...] = ()) -> Recipe:
    return Recipe(lambda: IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward)))


#: beside those of ``RECIPES``
OWN_RECIPES = {
    "wide": _lora("q_proj", "down_proj", "embed_tokens", r=7),
    "attention": _lora("q_proj", "v_proj"),
    "feedforward": _lora("gate_proj", "down_proj"),
    "attention-again": _lora("q_proj", "v_proj"),
    "ia3-one": _ia3("k_proj", "down_proj", feedforward=("down_proj",)),
    "ia3-two": _ia3("k_proj", "down_proj", feedforward=("down_proj",)),
    "ia3-attention": _ia3("k_proj", "v_proj"),
    "ia3-outputs": _ia3("k_proj", "down_proj", "up_proj"),
    "ia3-inputs": _ia3("down_proj", "up_proj", feedforward=("down_proj", "up_proj")),
    "ia3-saved": _ia3("q_proj", "down_proj", feedforward=("down_proj",)),
    "head": _lora("v_proj", modules_to_save=["lm_head"]),
    "head-too": _lora("v_proj", modules_to_save=["lm_head"]),
}


class Bench:
    """An engine over a tiny llama with biases, and adapters that are made and loaded when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.base_dir = tiny_checkpoint(root, "llama", tie_word_embeddings=False, **BASES["llama"])
        self.engine: LocalEngine = local_engine(
            self.base_dir, adapter_dirs=(root,), max_num_batched_tokens=24, max_num_seqs=12
        )
        self._root = root
        self._loaded: dict[str, Path] = {}

    def adapter(self, name: str) -> Path:
        if name not in self._loaded:
            path = save(
                {**RECIPES, **OWN_RECIPES}[name],
                self.base_dir,
                self._root / "adapters" / name,
                seed=crc32(name.encode()),
            )
            self.engine.load_adapter(name, str(path))
            self._loaded[name] = path
        return self._loaded[name]

    def parts(self, weights: dict[str, float]) -> Parts:
        return [(self.adapter(name), weight) for name, weight in weights.items()]

    def request(self, weights: dict[str, float], seed: int = 0) -> Request:
        for name in weights:
            self.adapter(name)
        return Request(
            f"r{seed}",
            prompt(21, seed=seed),
            adapters=tuple(AdapterRef(name, weight) for name, weight in weights.items()),
            stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True),
            output=OutputOptions(logprobs=20, prompt_logprobs=True),
        )

    def ask(self, *weights: dict[str, float]) -> list[Generation]:
        """One request for each set of weights, with one prompt, in one batch with the base."""
        *got, base = self.engine.generate([*map(self.request, weights), self.request({})])
        assert all(generation.failure is None for generation in (*got, base))
        return got


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sums"))


def distance(got: Generation, oracle: Alone) -> float:
    """The largest difference of a log-probability, over the prompt and what came after."""
    ids = [*got.request.prompt_token_ids, *got.token_ids]
    expected = oracle.prompt_rows(ids).log_softmax(-1)
    # the first token of a prompt has no logprob
    rows: list[tuple[int, TokenLogprob]] = [
        *enumerate(got.prompt_logprobs[-len(got.request.prompt_token_ids) + 1 :]),
        *enumerate(got.logprobs, start=len(got.request.prompt_token_ids) - 1),
    ]
    assert len(rows) == len(ids) - 1
    return max(
        abs(candidate.logprob - float(expected[row, candidate.token_id]))
        for row, logprob in rows
        for candidate in (logprob, *logprob.top)
    )


CATS = (
    {"lora": 0.7, "wide": -0.4},
    {"lora": 1.0, "rslora": 1.5, "lora-ranks": -1.0, "lora-ends": 0.25},
    {"wide": 2.0},
)


@pytest.mark.parametrize("weights", CATS, ids=lambda weights: "+".join(weights))
def test_cat(bench: Bench, weights: dict[str, float]) -> None:
    """An rsLoRA is never the first: PEFT would scale the sum by the root of its rank once more."""
    [got] = bench.ask(weights)
    assert distance(got, combined(bench.base_dir, bench.parts(weights), "cat")) < TOLERANCE


def test_linear_where_no_two_meet(bench: Bench) -> None:
    weights = {"attention": 0.6, "feedforward": -1.2}
    [got] = bench.ask(weights)
    assert distance(got, combined(bench.base_dir, bench.parts(weights), "linear")) < TOLERANCE


def test_linear_is_no_sum_where_two_meet(bench: Bench) -> None:
    """Ours is the sum of what they change; PEFT says of its own that it is a rough approximation."""
    weights = {"attention": 0.6, "attention-again": 0.4}
    [got] = bench.ask(weights)
    assert distance(got, combined(bench.base_dir, bench.parts(weights), "linear")) > 100 * TOLERANCE
    assert distance(got, combined(bench.base_dir, bench.parts(weights), "cat")) < TOLERANCE


def test_ia3_vectors(bench: Bench) -> None:
    weights = {"ia3-one": 0.7, "ia3-two": 0.3}
    [got] = bench.ask(weights)
    assert distance(got, combined_ia3(bench.base_dir, bench.parts(weights))) < TOLERANCE


def test_active_together(bench: Bench) -> None:
    weights = {"dora": 1.0, "lora": 0.5, "rslora": -0.8}
    [got] = bench.ask(weights)
    assert distance(got, active_together(bench.base_dir, bench.parts(weights))) < TOLERANCE


def test_active_mixed(bench: Bench) -> None:
    weights = {"lora": 0.5, "loha": -0.3, "lokr": 1.5}
    [got] = bench.ask(weights)
    assert distance(got, active_mixed(bench.base_dir, bench.parts(weights))) < TOLERANCE


MERGED = (
    {"lora": 0.5, "rslora": -0.2, "loha": 0.3, "dora": 1.0, "vera": 1.2, "adalora": 0.4, "lokr-both": -1.0},
    {"bdlora": 0.8, "lora-lora-bias": 1.3, "lora-bias-only": -0.5, "ia3": 0.6},
    {"dora": 1.0, "ia3-attention": 0.5, "wide": 1.0},
    {"lora-saved-linear": 1.0, "lora": 0.5, "ia3-attention": 0.7},
    {"ln-tuning": 1.0, "lora-saved-head": 1.0, "trainable-tokens": 1.0, "lora": -0.3, "ia3-one": 0.5},
)


@pytest.mark.parametrize("weights", MERGED, ids=lambda weights: "+".join(weights))
def test_changes_add_up(bench: Bench, weights: dict[str, float]) -> None:
    [got] = bench.ask(weights)
    assert distance(got, merged_changes(bench.base_dir, bench.parts(weights))) < TOLERANCE


@pytest.mark.parametrize(
    "names",
    [("ia3-inputs", "ia3-outputs"), ("ia3-outputs", "ia3-inputs"), ("lora-saved-linear", "ia3-saved")],
    ids="+".join,
)
def test_scales_and_own_weights_of_one_site_multiply(bench: Bench, names: tuple[str, ...]) -> None:
    [got] = bench.ask(dict.fromkeys(names, 1.0))
    assert distance(got, merged_in_turn(bench.base_dir, [bench.adapter(name) for name in names])) < TOLERANCE


def test_the_order_does_not_matter(bench: Bench) -> None:
    """PEFT's does, where a DoRA comes later; a sum has none."""
    weights = {"lora": 0.5, "dora": 1.0, "ia3-attention": 0.3}
    backwards = dict(reversed(weights.items()))
    one, other = bench.ask(weights, backwards)
    oracle = merged_changes(bench.base_dir, bench.parts(weights))
    assert max(distance(one, oracle), distance(other, oracle)) < TOLERANCE


def test_weights_are_apart_in_one_batch(bench: Bench) -> None:
    """One prompt, the same adapters, other weights: no page of one is another's, and a weight of 0 is the base."""
    sets = [{"lora": w, "loha": 1 - w} for w in (0.0, 0.25, 1.0)] + [{"lora": 0.25}, {"lora": 0.0}]
    for _ in range(2):  # the second time from the prefix cache
        for weights, got in zip(sets, bench.ask(*sets), strict=True):
            assert distance(got, merged_changes(bench.base_dir, bench.parts(weights))) < TOLERANCE, weights


REFUSED = {
    "two DoRAs": ({"dora": 1.0, "dora-rslora": 1.0}, "magnitudes"),
    "two saved heads": ({"head": 1.0, "head-too": 1.0}, "saved module"),
    "a weighted DoRA": ({"dora": 0.5}, "allowed is 1"),
    "a weighted DoRA in a sum": ({"lora": 0.5, "dora": 0.5}, "allowed is 1"),
    "a weighted head": ({"head": 0.5, "lora": 1.0}, "allowed is 1"),
    "weighted tokens": ({"trainable-tokens": 2.0}, "allowed is 1"),
    "added vocabularies of two sizes": ({"lora-added-tokens": 1.0, "wider": 1.0}, "vocabular"),
}
OWN_RECIPES["wider"] = Recipe(
    lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[96, 97, 98]), vocab_size=99
)


def refusal(bench: Bench, request: Request) -> LoraplexError:
    [got] = bench.engine.generate([request])
    assert got.failure is not None
    assert got.num_endings == 1
    return got.failure.to_error()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(bench: Bench, name: str) -> None:
    """Each by the adapters' names and the reason, and the next request is served."""
    weights, reason = REFUSED[name]
    error = refusal(bench, bench.request(weights))
    assert isinstance(error, InvalidRequest)
    assert reason in str(error)
    assert any(repr(adapter) in str(error) for adapter in weights)
    bench.ask({"lora": 1.0})
    assert all(info.in_flight == 0 for info in bench.engine.list_adapters())


def test_too_many(bench: Bench) -> None:
    names = [name for name, recipe in RECIPES.items() if name.startswith("lora") and recipe.tied is None]
    weights = dict.fromkeys(names[: MAX_ADAPTERS_PER_REQUEST + 1], 0.1)
    assert len(weights) > MAX_ADAPTERS_PER_REQUEST
    error = refusal(bench, bench.request(weights))
    assert isinstance(error, InvalidRequest)
    assert str(MAX_ADAPTERS_PER_REQUEST) in str(error)


def test_one_twice(bench: Bench) -> None:
    bench.adapter("lora")
    twice = Request("twice", prompt(5), adapters=(AdapterRef("lora"), AdapterRef("lora", 0.5)))
    assert isinstance(refusal(bench, twice), InvalidRequest)


def test_the_measure_sees_small_weights(bench: Bench) -> None:
    """Otherwise the tolerance could hide a weight that is left out."""
    [got] = bench.ask({"lora": 0.5})
    other = merged_changes(bench.base_dir, bench.parts({"lora": 0.49}))
    assert distance(got, other) > 10 * TOLERANCE
    assert torch.isfinite(torch.tensor(distance(got, other)))
