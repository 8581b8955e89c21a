"""The text form of a merge: it says all there is to say, and what may not be said is refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import msgspec
import pytest

from loraplex.adapters.merging.recipe import MAX_DEPTH, decode, encode, is_recipe, shown
from loraplex.errors import InvalidRequest
from loraplex.types import MAX_MERGE_BYTES, MAX_MERGE_INPUTS, MergeInput, MergeOptions, MergeRecipe
from tests.servers import environment

CAT = MergeOptions("cat")


def recipe(*sources: str, weight: float = 0.5, options: MergeOptions = CAT) -> MergeRecipe:
    return MergeRecipe(tuple(MergeInput(f"n{i}", s, f"u{i}", weight) for i, s in enumerate(sources)), options)


def text(**changes: object) -> str:
    """A recipe of one input, as JSON that ``changes`` are made to."""
    return "merge:" + json.dumps({**msgspec.to_builtins(recipe("/a")), **changes})


def test_text_is_the_whole_recipe() -> None:
    options = MergeOptions("dare_ties_svd", 0.25, "frequency", 7, 0.99, seed=(1 << 64) - 1)
    inner = recipe('/a "quoted" \\ ключ', "/b", weight=-1e-300)
    outer = recipe(encode(inner), "/c", weight=0.1, options=options)
    assert decode(encode(outer)) == outer
    assert decode(decode(encode(outer)).inputs[0].source) == inner
    assert encode(outer).startswith("merge:{")
    assert "\n" not in encode(outer)
    assert is_recipe(encode(inner))
    assert not is_recipe("/merge:")


def test_a_merge_is_shown_by_what_it_is_made_of() -> None:
    assert shown(encode(recipe("/a", "/b"))) == "a merge of 'n0' and 'n1' (cat)"
    assert shown("/a") == "'/a'"
    assert shown("merge:" + "x" * 9999) == repr("merge:" + "x" * 58)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("merge:", "truncated"),
        ("merge:{", "truncated"),
        ("merge:[]", "Expected `object`"),
        ("merge:" + "[" * 4000, "Expected `object`"),
        ("merge:\ud800", "surrogates"),
        ("/a", "begins with 'merge:'"),
        (text() + " " * MAX_MERGE_BYTES, f"allowed are {MAX_MERGE_BYTES} bytes"),
        (text(inputs=[]), "inputs is empty"),
        (text(inputs=[{"name": "a", "source": "/a", "uid": ""}]), "missing required field `weight`"),
        (text(inputs=[{"name": "a", "source": "/a", "uid": "", "weight": "NaN"}]), "Expected `float`"),
        (text().replace("0.5", "NaN"), "invalid"),
        (text().replace("0.5", "1e999"), "out of range"),
        (text(options={"method": "mean"}), "method 'mean' is unknown"),
        (text(options={"method": "cat", "seed": -1}), "seed -1 is outside its range"),
        (text(options={"method": "linear", "svd_rank": 4}), "svd_rank 4 has no use in 'linear'"),
        (text(options={"method": "ties", "density": 1.5}), "density 1.5 is outside its range"),
        (text(inputs=[{"name": "a", "source": "merge:{}", "uid": "", "weight": 1}]), "missing required field"),
    ],
)
def test_what_is_no_recipe(source: str, part: str) -> None:
    with pytest.raises(InvalidRequest, match=part.replace("(", r"\(").replace("[", r"\[")) as caught:
        decode(source)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_numbers(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="weight"):
        encode(recipe("/a", weight=weight))


def test_merges_of_merges_are_bounded() -> None:
    deep = "/a"
    for _ in range(MAX_DEPTH):
        deep = encode(recipe(deep))
    assert decode(deep)
    with pytest.raises(InvalidRequest, match=f"{MAX_DEPTH + 1} deep"):
        encode(recipe(deep))
    half = encode(recipe(*["/a"] * (MAX_MERGE_INPUTS // 2)))
    assert decode(encode(recipe(half, half)))
    with pytest.raises(InvalidRequest, match=f"are {MAX_MERGE_INPUTS + 1}"):
        encode(recipe(half, half, "/b"))
    with pytest.raises(InvalidRequest, match=f"allowed are {MAX_MERGE_BYTES} bytes"):
        encode(recipe("/" + "a" * MAX_MERGE_BYTES))


def test_front_ends_need_no_torch_for_it() -> None:
    code = "import loraplex.adapters.merging.recipe, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
