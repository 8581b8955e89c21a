"""What cannot be merged is refused, naming what, which value and what is allowed, before anything is merged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.merging.merge import merge
from loraplex.adapters.merging.methods import METHODS, Form
from loraplex.adapters.merging.options import check_options
from loraplex.errors import InvalidRequest, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.text.pack import AdapterText, TextPack
from loraplex.types import MAX_MERGE_INPUTS, MergeOptions, OwnText
from tests import peft_kinds
from tests.adapters.peft_merges import adapter, of, view
from tests.adapters.peft_sites import load
from tests.fakes_adapters import view_of
from tests.tiny import oracle, tiny_checkpoint

BASE = view((40, 24), (6, 30))
ONE, OTHER = adapter(BASE, 0), adapter(BASE, 1)
NAN = math.nan

OPTIONS: tuple[tuple[str, dict[str, Any], str, tuple[str, ...]], ...] = (
    ("an unknown method", {"method": "slerp"}, "method", ("'slerp'", *METHODS)),
    ("no method", {"method": ""}, "method", ("linear",)),
    ("a density above one", {"method": "ties", "density": 1.5}, "density", ("1.5", "0 to 1")),
    ("a density below zero", {"method": "ties", "density": -0.1}, "density", ("-0.1",)),
    ("a density of NaN", {"method": "ties", "density": NAN}, "density", ("nan",)),
    ("no density", {"method": "dare_ties_svd"}, "density", ("missing", "'dare_ties_svd'")),
    ("a density too much", {"method": "svd", "density": 0.5}, "density", ("0.5", "'svd'", "magnitude_prune_svd")),
    (
        "an unknown majority",
        {"method": "ties", "density": 0.5, "majority_sign_method": "most"},
        "majority_sign_method",
        ("'most'", "total", "frequency"),
    ),
    (
        "a majority too much",
        {"method": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"},
        "majority_sign_method",
        ("ties", "dare_ties"),
    ),
    ("a rank below zero", {"method": "svd", "svd_rank": -1}, "svd_rank", ("-1",)),
    ("a rank above all", {"method": "svd", "svd_rank": 1 << 20}, "svd_rank", ("1048576",)),
    ("a rank above a site's", {"method": "svd", "svd_rank": 7}, "svd_rank", ("7", "'s1'", "6 x 30", "up to 6")),
    ("a cat's rank above a site's", {"method": "cat", "svd_rank": 25}, "svd_rank", ("25", "'s0'", "up to 24")),
    ("a rank too much", {"method": "linear", "svd_rank": 4}, "svd_rank", ("'linear'", "cat, svd")),
    ("a clamp above one", {"method": "svd", "svd_clamp": 1.1}, "svd_clamp", ("1.1",)),
    ("a clamp of NaN", {"method": "svd", "svd_clamp": NAN}, "svd_clamp", ("nan",)),
    ("a clamp too much", {"method": "cat", "svd_clamp": 0.9}, "svd_clamp", ("'cat'",)),
    ("a clamp that bounds nothing", {"method": "svd", "svd_clamp": 0.2}, "svd_clamp", ("0.2", "'s0'", "0.99")),
    ("an error above one", {"method": "cat", "max_error": 2.0}, "max_error", ("2.0",)),
    ("an error too much", {"method": "linear", "max_error": 0.1}, "max_error", ("'linear'",)),
    ("an error and a rank", {"method": "cat", "max_error": 0.1, "svd_rank": 3}, "svd_rank", ("exclude", "0.1")),
    ("an error and a clamp", {"method": "svd", "max_error": 0.1, "svd_clamp": 0.9}, "svd_clamp", ("exclude",)),
    ("a seed below zero", {"method": "dare_linear", "density": 0.5, "seed": -1}, "seed", ("-1",)),
    ("a seed too large", {"method": "dare_linear", "density": 0.5, "seed": 1 << 64}, "seed", (str((1 << 64) - 1),)),
    ("a seed too much", {"method": "ties", "density": 0.5, "seed": 1}, "seed", ("dare_linear", "'ties'")),
)


@pytest.mark.parametrize(
    ("options", "field", "said"), [case[1:] for case in OPTIONS], ids=[case[0] for case in OPTIONS]
)
def test_options(options: dict[str, Any], field: str, said: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        merge([(ONE, 1.0), (OTHER, 1.0)], MergeOptions(**options), BASE)
    assert refused.value.field == field
    assert all(part in str(refused.value) for part in said), str(refused.value)


def test_options_that_are_right_pass() -> None:
    for name, method in METHODS.items():
        taken = {
            "density": 1e-9,
            "majority_sign_method": "frequency",
            "svd_rank": 5,
            "svd_clamp": 1.0,
            "seed": (1 << 64) - 1,
        }
        assert check_options(MergeOptions(name, **{key: taken[key] for key in method.options if key in taken}))
        assert check_options(MergeOptions(name, density=1.0)) is method, "it prunes nothing"
        if method.form is not Form.FACTOR_WISE:
            share = {"density": 0.5} if "density" in method.options else {}
            assert check_options(MergeOptions(name, max_error=1.0, **share)) is method


@pytest.mark.parametrize("weight", [NAN, math.inf, -math.inf])
def test_weights_that_are_no_numbers(weight: float) -> None:
    with pytest.raises(InvalidRequest, match=r"inputs has a weight of -?(nan|inf) for input 2 \(a lora\)") as refused:
        merge([(ONE, 1.0), (OTHER, weight)], MergeOptions("cat"), BASE)
    assert refused.value.field == "inputs"


def test_inputs_by_number() -> None:
    with pytest.raises(InvalidRequest, match="is empty"):
        merge([], MergeOptions("cat"), BASE)
    with pytest.raises(InvalidRequest, match=f"are {MAX_MERGE_INPUTS + 1}; allowed are {MAX_MERGE_INPUTS}"):
        merge([(ONE, 1.0)] * (MAX_MERGE_INPUTS + 1), MergeOptions("cat"), BASE)


def test_merges_that_come_to_nothing() -> None:
    with pytest.raises(InvalidRequest, match="all have weight 0"):
        merge([(ONE, 0.0), (OTHER, 0.0)], MergeOptions("cat"), BASE)
    with pytest.raises(InvalidRequest, match="come to nothing"):
        merge([(ONE, 1.0), (OTHER, 1.0)], MergeOptions("magnitude_prune", density=1e-9), BASE)
    nothing = of({"s0": SiteDelta(LowRank(torch.zeros(1, 24), torch.zeros(40, 1), 1.0))}, identity=True)
    assert merge([(nothing, 1.0)], MergeOptions("cat"), BASE).delta.identity, "it says so of itself"
    silent = replace(nothing, identity=False)
    with pytest.raises(InvalidRequest, match="come to nothing"):
        merge([(nothing, 1.0), (silent, 1.0)], MergeOptions("cat"), BASE)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].form is Form.FACTOR_WISE])
def test_ranks_that_differ(method: str) -> None:
    share = {"density": 0.5} if "density" in METHODS[method].options else {}
    with pytest.raises(InvalidRequest, match=rf"{method}.*equal ranks; at 's0' the inputs have 2, 4 \(cat") as refused:
        merge([(ONE, 1.0), (adapter(BASE, 1, rank=2), 1.0)], MergeOptions(method, **share), BASE)
    assert refused.value.field == "method"


def test_a_bound_below_rounding() -> None:
    base = view((40, 24), dtype=torch.bfloat16)
    inputs = [(adapter(base, seed), 0.7) for seed in range(2)]
    with pytest.raises(
        InvalidRequest, match=r"0\.0001 cannot be kept at 's0': rounding to torch.bfloat16 alone"
    ) as refused:
        merge(inputs, MergeOptions("cat", max_error=1e-4), base)
    assert refused.value.field == "max_error"


@pytest.mark.parametrize("weight", [1e15, 1e300, -1e300])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_leave_the_range(method: str, weight: float) -> None:
    base = view((40, 24), dtype=torch.float16)
    share = {"density": 0.5} if "density" in METHODS[method].options else {}
    with pytest.raises(InvalidRequest, match="weights with which 's0' leaves the range") as refused:
        merge([(adapter(base, 0), weight), (adapter(base, 1), 1.0)], MergeOptions(method, **share), base)
    assert refused.value.field == "inputs"


@pytest.mark.parametrize("is_b", [False, True])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.form is Form.FACTOR_WISE])
def test_either_factor_may_leave_the_range(method: str, is_b: bool) -> None:
    """By itself, while the change stays within it."""
    base = view((40, 24), dtype=torch.float16)
    of_a, of_b = (1e-4, 6e4) if is_b else (6e4, 1e-4)
    change = LowRank(torch.full((4, 24), of_a).half(), torch.full((40, 4), of_b).half(), 1.0)
    share = {"density": 1.0} if "density" in METHODS[method].options else {}
    with pytest.raises(InvalidRequest, match=r"weights with which 's0' leaves the range of torch\.float16"):
        merge([(of({"s0": SiteDelta(change)}), 100.0)], MergeOptions(method, **share), base)


@pytest.mark.parametrize("change", [SiteDelta(shift=torch.ones(40)), SiteDelta(out_scale=torch.full((40,), 2.0))])
def test_weights_that_take_vectors_out_of_the_range(change: SiteDelta) -> None:
    with pytest.raises(InvalidRequest, match="weights with which 's0' leaves the range"):
        merge([(of({"s0": change}), 1e300)], MergeOptions("linear"), BASE)


ROWS = SiteDelta(rows=Rows(torch.ones(40, 24)), exclusive="a saved module")
SCALES = SiteDelta(out_scale=torch.full((40,), 2.0))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([(of({"s0": ROWS}), 1.0), (ONE, 1.0)], ("input 1", "a saved module", "'s0'", "input 2 (a lora) touches")),
        ([(ONE, 0.0), (of({"s0": ROWS}), 1.0)], ("input 2", "input 1 (a lora) touches")),
        ([(of({"s0": ROWS}), 0.5)], ("a saved module", "with weight 0.5")),
        ([(of({"s0": SCALES}, kind="ia3"), 1.0), (ONE, 1.0)], ("input 1 (a ia3)", "no plain sum (out scale)")),
    ],
    ids=["another input", "another of weight 0", "a weight", "a scale beside a product"],
)
def test_changes_that_are_no_terms(inputs: list[tuple[AdapterDelta, float]], said: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedFeature) as refused:
        merge(inputs, MergeOptions("cat"), BASE)
    assert refused.value.field == "inputs"
    assert all(part in str(refused.value) for part in said), str(refused.value)


def test_scales_are_not_elected() -> None:
    two = [(of({"s0": SCALES}, kind="ia3"), 1.0)] * 2
    assert merge(two, MergeOptions("linear"), BASE).delta.sites["s0"].out_scale is not None
    with pytest.raises(UnsupportedFeature, match="out scale"):
        merge(two, MergeOptions("ties", density=0.5), BASE)


@pytest.mark.parametrize(("name", "why"), [("dora", "magnitudes"), ("alora", "invocation tokens"), ("ia3-up", "scale")])
def test_kinds_that_have_no_sum_with_a_lora(name: str, why: str, tmp_path: Path) -> None:
    base_dir = tiny_checkpoint(tmp_path, "llama")
    base = view_of(oracle(base_dir))
    plain, odd = (
        load(peft_kinds.save(peft_kinds.RECIPES[each], base_dir, tmp_path / each), base) for each in ("lora", name)
    )
    with pytest.raises(UnsupportedFeature, match=why):
        merge([(plain, 0.5), (odd, 0.5)], MergeOptions("cat"), base)


def test_vocabularies_and_texts_that_differ() -> None:
    def text(digest: str) -> AdapterText:
        return AdapterText(OwnText(digest), TextPack())

    wide = [replace(ONE, vocab_size=10), replace(OTHER, vocab_size=12)]
    with pytest.raises(UnsupportedFeature, match=r"input 1 \(a lora\) knows 10 tokens, input 2 \(a lora\) knows 12"):
        merge([(delta, 1.0) for delta in wide], MergeOptions("cat"), BASE)
    with pytest.raises(UnsupportedFeature, match=r"ship different tokenizers"):
        merge([(replace(ONE, text=text("x")), 1.0), (replace(OTHER, text=text("y")), 1.0)], MergeOptions("cat"), BASE)
    kept = merge(
        [(replace(ONE, text=text("x"), vocab_size=10), 1.0), (OTHER, 1.0), (replace(OTHER, text=text("x")), 1.0)],
        MergeOptions("cat"),
        BASE,
    ).delta
    assert kept.text == text("x")
    assert kept.vocab_size == 10
