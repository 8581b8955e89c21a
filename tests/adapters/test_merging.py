"""Merged adapters equal PEFT's ``add_weighted_adapter``, or the sums that they stand for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.merging.merge import merge
from loraplex.adapters.merging.methods import METHODS, Form
from loraplex.types import MergeOptions
from tests import peft_kinds
from tests.adapters.peft_merges import (
    SEED,
    Both,
    adapter,
    changed_model,
    dense,
    dense_sum,
    logits,
    of,
    view,
)
from tests.adapters.peft_sites import check_sites, load, lora_config
from tests.fakes_adapters import sites_of, view_of
from tests.tiny import ALL_LINEAR, CONFIGS, load_tiny, oracle, tiny_checkpoint, tiny_model

WEIGHTS = {"a": 0.7, "b": -0.5, "c": 1.2}
#: of logits, relative to the largest. PEFT truncates by a float32 SVD, which errs where singular values are close
TOLERANCE = {Form.FACTOR_WISE: 1e-4, Form.CAT: 1e-4, Form.SVD: 1e-3}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def equal_ranks(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Other targets, embedding and head among them, other scales, one rank."""
    some = ["q_proj", "k_proj", "up_proj", "embed_tokens", "lm_head"]
    configs = {
        "a": lora_config(r=4, lora_alpha=8, target_modules=[*ALL_LINEAR, "embed_tokens"], alpha_pattern={"k_proj": 3}),
        "b": lora_config(r=4, lora_alpha=6, target_modules=some),
        "c": lora_config(r=4, lora_alpha=3, target_modules=list(ALL_LINEAR), use_rslora=True),
    }
    return Both.make(model, tmp_path_factory.mktemp("equal"), configs)


@pytest.fixture(scope="module")
def other_ranks(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Ranks that differ between adapters and between their sites."""
    configs = {
        "a": lora_config(r=4, target_modules=list(ALL_LINEAR), rank_pattern={"q_proj": 1, "mlp.up_proj": 7}),
        "b": lora_config(r=2, target_modules=["q_proj", "o_proj", "embed_tokens"], alpha_pattern={"o_proj": 9}),
        "c": lora_config(r=3, target_modules=["k_proj", "o_proj", "lm_head", "embed_tokens"]),
    }
    return Both.make(model, tmp_path_factory.mktemp("other"), configs)


def check_merge(both: Both, weights: dict[str, float], method: str, **options: Any) -> None:
    """The same merge by both: equal logits, which are not the base's, nor those of one input."""
    seed = {"seed": SEED} if "seed" in METHODS[method].options else {}
    merged = both.ours(weights, MergeOptions(method, **options, **seed))
    with both.theirs(weights, method, **options) as theirs:
        expected = logits(theirs)
    got = logits(changed_model(both.model, merged.delta))
    scale = float(expected.abs().amax())
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[METHODS[method].form] * scale)
    others = [logits(both.model), logits(changed_model(both.model, both.deltas["a"]))]
    assert all((expected - other).abs().amax() > 0.05 * scale for other in others)


SHARES = {"density": 0.4}
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3}),
    ("svd", {"svd_rank": 16}),
    ("svd", {"svd_clamp": 0.95}),
    *((method, SHARES) for method in METHODS if "density" in METHODS[method].options),
    *((method, {**SHARES, "majority_sign_method": "frequency"}) for method in METHODS if METHODS[method].elects),
    ("magnitude_prune", {"density": 0.01}),
    ("ties_svd", {**SHARES, "svd_rank": 6, "svd_clamp": 0.9}),
    ("dare_linear_svd", {**SHARES, "svd_clamp": 0.98}),
)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_a_merge_is_that_of_peft(equal_ranks: Both, method: str, options: dict[str, Any]) -> None:
    check_merge(equal_ranks, WEIGHTS, method, **options)


def test_tokens_by_which_it_shows_are_those_of_its_embedding(equal_ranks: Both) -> None:
    merged = equal_ranks.ours(WEIGHTS, MergeOptions("cat")).delta
    assert merged.telling_tokens
    low_rank = merged.sites["model.embed_tokens"].low_rank
    assert low_rank is not None
    largest = low_rank.a.norm(dim=0).topk(len(merged.telling_tokens)).indices
    assert merged.telling_tokens == tuple(sorted(largest.tolist()))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_zero_and_below(equal_ranks: Both, method: str) -> None:
    options = SHARES if "density" in METHODS[method].options else {}
    check_merge(equal_ranks, {"b": -0.9, "a": 0.0, "c": 0.6}, method, **options)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].pruning.name != "NONE"])
def test_a_density_of_one_prunes_nothing(equal_ranks: Both, method: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1")
        check_merge(equal_ranks, WEIGHTS, method, density=1.0)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].form is not Form.FACTOR_WISE])
def test_ranks_that_differ(other_ranks: Both, method: str) -> None:
    options = SHARES if "density" in METHODS[method].options else {}
    check_merge(other_ranks, WEIGHTS, method, **options)


def test_every_module_computes_what_pefts_does(equal_ranks: Both, other_ranks: Both) -> None:
    weights = {"a": 0.9, "b": 0.4, "c": 0.8}
    for both, method in ((equal_ranks, "linear"), (other_ranks, "cat")):
        with both.theirs(weights, method) as theirs:
            check_sites(both.model, theirs, both.ours(weights, MergeOptions(method)).delta)


def test_a_rslora_that_comes_first(equal_ranks: Both) -> None:
    """PEFT makes the result a rsLoRA with alpha = r then, and so multiplies it by the root of r once more."""
    weights = {"c": 0.8, "a": 0.5}
    merged = equal_ranks.ours(weights, MergeOptions("linear")).delta
    with equal_ranks.theirs(weights, "linear") as theirs:
        for module in theirs.modules():
            if isinstance(module, LoraLayer) and "merged" in module.scaling:
                assert module.scaling["merged"] == 2
                module.scaling["merged"] = 1
        expected = logits(theirs)
    torch.testing.assert_close(logits(changed_model(equal_ranks.model, merged)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_come_in_the_order_in_which_peft_draws(name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, name)
    ours = [site.name for site in load_tiny(path).sites() if site.has_matrix]
    theirs = [site.name for site in sites_of(oracle(path)) if site.has_matrix]
    assert sorted(ours) == sorted(theirs)
    # layers of these declare their feed-forward part before the mixer that comes first
    assert (ours == theirs) is (name not in ("bamba", "falcon_h1", "granitemoehybrid"))


# ---- kinds that PEFT does not merge ----


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, dict[str, AdapterDelta]]:
    """An adapter of each kind whose lowered form is a sum's term."""
    folder = tmp_path_factory.mktemp("kinds")
    base_dir = tiny_checkpoint(folder, "qwen2", tie_word_embeddings=False)
    names = ("lora-ranks", "lora-lora-bias", "lora-bias-only", "bdlora", "adalora", "vera", "loha", "lokr")
    model = oracle(base_dir)
    return model, {
        name: load(peft_kinds.save(peft_kinds.RECIPES[name], base_dir, folder / name), view_of(model)) for name in names
    }


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_all_kinds_that_add_a_low_rank_change(
    kinds: tuple[PreTrainedModel, dict[str, AdapterDelta]], method: str
) -> None:
    model, deltas = kinds
    base = view_of(model)
    inputs = [(delta, 0.3 + 0.2 * index) for index, delta in enumerate(deltas.values())]
    smallest = min(min(site.in_features, site.out_features) for site in base.sites if site.has_matrix)
    merged = merge(inputs, MergeOptions(method, svd_rank=smallest if method == "svd" else 0), base).delta
    assert set(merged.sites) == {name for delta in deltas.values() for name in delta.sites}
    for name, change in merged.sites.items():
        expected = dense_sum(inputs, name)
        full = method == "cat" or smallest == min(expected.shape)
        shape = expected.shape
        assert change.rank <= min(shape), "a rank that no matrix of this shape has"
        if full:
            torch.testing.assert_close(dense(merged, name), expected, rtol=0, atol=1e-5 * float(expected.abs().amax()))
        shifts = [
            weight * delta.sites[name].shift
            for delta, weight in inputs
            if name in delta.sites and delta.sites[name].shift is not None
        ]
        assert (change.shift is None) is (not shifts)
        if change.shift is not None:
            torch.testing.assert_close(change.shift, torch.stack(shifts).sum(0))
    assert any(change.shift is not None for change in merged.sites.values())


def test_shifts_are_pruned_and_elected_as_all_values_are() -> None:
    base = view((4, 6))
    one, other = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([-1.0, -4.0, 0.1, 3.0])
    inputs = [(of({"s0": SiteDelta(shift=one)}), 2.0), (of({"s0": SiteDelta(shift=other)}), 0.5)]
    ties = merge(inputs, MergeOptions("ties", density=0.5), base).delta.sites["s0"]
    # of each the two largest: [3, 0, 0, 2] and [0, -4, 0, 3]; the last value is the mean of two
    assert ties.low_rank is None
    assert ties.shift is not None
    assert ties.shift.tolist() == [6.0, -2.0, 0.0, (4.0 + 1.5) / 2]
    linear = merge(inputs, MergeOptions("linear"), base).delta.sites["s0"].shift
    assert linear is not None
    torch.testing.assert_close(linear, 2 * one + 0.5 * other)


def test_scales_have_a_sum_of_their_own() -> None:
    base = view((4, 6), (5, 5))
    outputs, inputs = torch.tensor([1.5, 0.0, 1.0, -1.0]), torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0])
    one = of({"s0": SiteDelta(out_scale=outputs), "s1": SiteDelta(in_scale=inputs)})
    other = of({"s0": SiteDelta(out_scale=outputs.flip(0))})
    merged = merge([(one, 0.5), (other, 2.0)], MergeOptions("cat"), base).delta.sites
    found = merged["s0"].out_scale, merged["s1"].in_scale
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0], 1 + 0.5 * (outputs - 1) + 2 * (outputs.flip(0) - 1))
    torch.testing.assert_close(found[1], 1 + 0.5 * (inputs - 1))


def test_a_whole_module_of_one_input_stays_as_it_is(tmp_path: Path) -> None:
    base_dir = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    model = oracle(base_dir)
    recipe, plain = peft_kinds.RECIPES["lora-saved-twin"], peft_kinds.RECIPES["lora"]
    one, other = (
        load(peft_kinds.save(each, base_dir, tmp_path / name, seed=seed), view_of(model))
        for seed, (name, each) in enumerate({"one": recipe, "other": plain}.items())
    )
    merged = merge([(one, 1.0), (other, 0.4)], MergeOptions("cat"), view_of(model)).delta
    assert one.exclusive
    assert merged.exclusive == one.exclusive
    for name in one.exclusive:
        assert merged.sites[name] is one.sites[name]
    together = one.sites.keys() & other.sites.keys()
    assert together
    for name in together:
        torch.testing.assert_close(dense(merged, name), dense_sum([(one, 1.0), (other, 0.4)], name), rtol=0, atol=1e-5)


# ---- what is known of the result ----


def test_the_result_is_an_adapter_as_any_other() -> None:
    base = view((40, 24), (24, 40), (30, 30))
    one, other = adapter(base, 0), of({"s2": adapter(base, 1, rank=2).sites["s2"]}, uid="other")
    before = [tensor.clone() for delta in (one, other) for site in delta.sites.values() for tensor in site.tensors]
    seen: list[SiteDelta] = []
    merged = merge([(other, 2.0), (one, 1.0)], MergeOptions("cat"), base, seen.append).delta
    assert (merged.kind, merged.max_rank, list(merged.sites)) == ("merge:cat", 6, ["s0", "s1", "s2"])
    assert not merged.template_unused
    unused = merge([(one, 1.0), (replace(other, template_unused=True), 1.0)], MergeOptions("cat"), base).delta
    assert unused.template_unused
    assert merged.coverage.ranks == {"s0": 4, "s1": 4, "s2": 6}
    assert [id(change) for change in seen] == [id(change) for change in merged.sites.values()]
    after = [tensor for delta in (one, other) for site in delta.sites.values() for tensor in site.tensors]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "an input was changed"
    twice = merge([(merged, 0.5), (one, 1.0)], MergeOptions("cat"), base).delta
    torch.testing.assert_close(dense(twice, "s2"), dense_sum([(merged, 0.5), (one, 1.0)], "s2"), rtol=0, atol=1e-4)


def test_uids_tell_merges_apart() -> None:
    base = view((40, 24))
    one, other = adapter(base, 0), adapter(base, 1)

    def uid(first: float = 1.0, swapped: bool = False, **options: Any) -> str:
        inputs = [(one, first), (other, 1.0)]
        asked = MergeOptions(**{"method": "dare_linear", "density": 0.5, **options})
        return merge(inputs[::-1] if swapped else inputs, asked, base).delta.uid

    different = [uid(), uid(0.5), uid(swapped=True), uid(density=0.4), uid(seed=3), uid(method="dare_ties")]
    assert len(set(different)) == len(different)
    assert uid() == uid()


def test_the_same_seed_draws_the_same() -> None:
    base = view((40, 24), (24, 40))
    inputs = [(adapter(base, seed), 0.5) for seed in range(2)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        dense(merge(inputs, MergeOptions("dare_ties", density=0.5, seed=seed), base).delta, "s1") for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()), "it drew from torch's own generator"
