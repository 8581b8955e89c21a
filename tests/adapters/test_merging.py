"""Merged adapters equal PEFT's ``add_weighted_adapter``, or the sums that they stand for."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
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
TOLERANCE = {Form.FACTOR_WISE: 1e-5, Form.CAT: 1e-5, Form.SVD: 1e-3}


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
    ("svd", {"svd_rank": 20}),
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


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_zero_and_below(equal_ranks: Both, method: str) -> None:
    options = SHARES if "density" in METHODS[method].options else {}
    check_merge(equal_ranks, {"c": -0.9, "a": 0.0, "b": 0.6}, method, **options)


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
            if "merged" in getattr(module, "scaling", {}):
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
    assert ties.shift is not None and ties.shift.tolist() == [6.0, -2.0, 0.0, (4.0 + 1.5) / 2]
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
    assert found[0] is not None and found[1] is not None
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
    assert one.exclusive and merged.exclusive == one.exclusive
    for name in one.exclusive:
        assert merged.sites[name] is one.sites[name]
    together = one.sites.keys() & other.sites.keys()
    assert together
    for name in together:
        torch.testing.assert_close(dense(merged, name), dense_sum([(one, 1.0), (other, 0.4)], name), rtol=0, atol=1e-5)


# ---- compression ----


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (6, 40)])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_best_approximation_and_its_error(shape: tuple[int, int], rank: int) -> None:
    base = view(shape)
    inputs = [(adapter(base, seed, rank=3 + seed), 0.6 - 0.5 * seed) for seed in range(3)]
    exact = dense_sum(inputs, "s0")
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    for method in ("cat", "svd"):
        merged = merge(inputs, MergeOptions(method, svd_rank=rank), base)
        got = dense(merged.delta, "s0")
        assert merged.delta.sites["s0"].rank == rank
        torch.testing.assert_close(got, best, rtol=0, atol=1e-5 * float(exact.abs().amax()))
        true = float((got - exact).norm() / exact.norm())
        assert merged.errors["s0"] == pytest.approx(true, rel=1e-4)
        assert true == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_errors_of_dense_methods_are_those_of_their_merge(method: str, shape: tuple[int, int]) -> None:
    base = view(shape)
    inputs = [(adapter(base, seed), 0.8) for seed in range(2)]
    whole, part = (merge(inputs, MergeOptions(method, density=0.5, svd_rank=rank), base) for rank in (24, 3))
    exact, got = dense(whole.delta, "s0"), dense(part.delta, "s0")
    assert whole.errors["s0"] < 1e-6
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(got, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-5 * float(exact.abs().amax()))
    assert part.errors["s0"] == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-4)
    assert part.errors["s0"] > 0.05


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.3), (torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_the_least_rank_within_an_error(method: str, dtype: torch.dtype, bound: float) -> None:
    base = view((40, 24), (24, 40), (30, 30), dtype=dtype)
    inputs = [(adapter(base, seed, rank=6), 0.7) for seed in range(3)]
    share = {"density": 0.9} if method == "ties_svd" else {}
    merged = merge(inputs, MergeOptions(method, max_error=bound, **share), base)
    assert merged.errors.keys() == merged.delta.sites.keys()
    for name, change in merged.delta.sites.items():
        assert merged.errors[name] <= bound
        if not share:
            exact = dense_sum(inputs, name)
            assert float((dense(merged.delta, name) - exact).norm() / exact.norm()) <= bound
        fewer = merge(inputs, MergeOptions(method, svd_rank=change.rank - 1, **share), base)
        assert fewer.errors[name] > bound, "a lower rank does as well"
    assert {change.low_rank.a.dtype for change in merged.delta.sites.values() if change.low_rank} == {dtype}


def test_a_plain_cat_reports_no_errors() -> None:
    base = view((40, 24))
    merged = merge([(adapter(base, 0), 1.0), (adapter(base, 1), 1.0)], MergeOptions("cat"), base)
    assert not merged.errors
    assert merged.delta.max_rank == 8


def test_what_cancels_out_is_not_divided_by() -> None:
    base = view((40, 24), (24, 40))
    one = adapter(base, 0)
    alone = of({"s1": one.sites["s1"]})
    for options in (MergeOptions("svd"), MergeOptions("cat", max_error=0.1), MergeOptions("svd", svd_clamp=0.9)):
        merged = merge([(one, 1.0), (one, -1.0), (alone, 1.0)], options, base)
        assert dense(merged.delta, "s0").abs().amax() < 1e-5
        assert dense(merged.delta, "s1").abs().amax() > 0.1


# ---- memory ----


class Watch(TorchDispatchMode):
    """The most elements that the tensors made under it had together, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self.live or not key:
            return
        self.live[key] = storage.nbytes() // 4
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest = max(self.largest, self.live[key])
        self.peak = max(self.peak, sum(self.live.values()))


@contextmanager
def watched() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("options", [MergeOptions("cat"), MergeOptions("cat", svd_rank=6), MergeOptions("svd")])
def test_exact_sums_never_form_the_dense_matrix(options: MergeOptions) -> None:
    base = view((700, 600))
    inputs = [(adapter(base, seed), 0.5) for seed in range(4)]
    with watched() as watch:
        merge(inputs, options, base)
    assert 0 < watch.largest < 700 * 600 / 10


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd"])
def test_dense_methods_hold_no_more_for_more_inputs(method: str) -> None:
    base = view((300, 200), (200, 300), (300, 200))
    peaks = []
    for count in (2, 8):
        inputs = [(adapter(base, seed), 0.5) for seed in range(count)]
        with watched() as watch:
            merge(inputs, MergeOptions(method, density=0.5), base)
        peaks.append(watch.peak)
    assert watch.largest >= 300 * 200
    assert peaks[1] < peaks[0] + 300 * 200 / 2


# ---- what is known of the result ----


def test_the_result_is_an_adapter_as_any_other() -> None:
    base = view((40, 24), (24, 40), (30, 30))
    one, other = adapter(base, 0), of({"s2": adapter(base, 1, rank=2).sites["s2"]}, uid="other")
    before = [tensor.clone() for delta in (one, other) for site in delta.sites.values() for tensor in site.tensors]
    seen: list[tuple[int, int]] = []
    merged = merge([(other, 2.0), (one, 1.0)], MergeOptions("cat"), base, lambda *step: seen.append(step)).delta
    assert (merged.kind, merged.max_rank, list(merged.sites)) == ("merge:cat", 6, ["s0", "s1", "s2"])
    assert merged.coverage.ranks == {"s0": 4, "s1": 4, "s2": 6}
    assert seen == [(1, 3), (2, 3), (3, 3)]
    after = [tensor for delta in (one, other) for site in delta.sites.values() for tensor in site.tensors]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "an input was changed"
    again = merge([(merged, 0.5), (one, 1.0)], MergeOptions("linear"), view((40, 24))) if merged.max_rank == 4 else None
    assert again is None
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
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()), "it drew from torch's own generator"
