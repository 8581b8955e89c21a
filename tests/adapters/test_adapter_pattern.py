"""The bounded pattern matcher agrees with ``re.fullmatch`` and cannot be made to run away."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.reading.pattern import Pattern, PatternError, Steps

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
    "",
]
PATTERNS = [
    r".*q_proj",
    r".*\.(q|k|v)_proj$",
    r"^model\.layers\.\d+\..*",
    r"model\.layers\.(0|1[0-9])\.(self_attn|mlp)\.\w+",
    r"(?:.*?(?:attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:x))",
    r"(?!.*mlp).*proj",
    r"(?=.*mlp).*(?P<which>down|up)_proj",
    r"[^.]+",
    r"[a-z_.\]\-0-9]*",
    r"lm_{1}head|a{2,3}|b{,2}|x{1,}",
    r".*\bq_proj\b",
    r"\Am.*d\Z",
    r"a{x}|l{}m_head|lm_head",
    r"(((lm)))_(h|)ead?d",
    r"[]]|[^]]+",
    r"",
    r"a**",
    r"(a",
    r"a)",
    r"[a",
    r"*a",
    r"a{3,2}",
    r"^*",
    r"[z-a]",
    "\\",
]


def fullmatch(pattern: str, text: str) -> bool:
    return Pattern(pattern, Steps(100_000)).fullmatch(text)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_re(pattern: str, name: str) -> None:
    try:
        expected = bool(re.fullmatch(pattern, name))
    except re.error:
        with pytest.raises(PatternError):
            fullmatch(pattern, name)
    else:
        assert fullmatch(pattern, name) is expected


pieces = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", r"\W", r"\b", "^", "$", "[ab]", "[^a]", "[a-c.]", "(", "(?:", ")", "|",
     "*", "+", "?", "*?", "{2}", "{1,2}", "{,1}", "{", "}", "(?=", "(?!", "1", "_", r"\s", "-", "]", ","]
)  # fmt: skip


@given(st.lists(pieces, max_size=9).map("".join), st.text(alphabet="ab.1_", max_size=7))
@settings(max_examples=1500, deadline=None)
def test_agrees_with_re_on_random_patterns(pattern: str, text: str) -> None:
    try:
        found = fullmatch(pattern, text)
    except PatternError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found is bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", r"(?<=a)b", r"(?<!a)b", r"(?i)a", r"(?>a)", r"a*+", r"a++", r"\x61", r"\n", r"(?P=x)", r"(?(1)a)"],
)
def test_what_is_not_read_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"pattern '"):
        fullmatch(pattern, "a")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"((a*)*)*$",
        r"(a|aa)+$",
        r"(.*a){30}$",
        r"((a{0,1000}){0,1000}){0,1000}$",
        r"(?:(?:a?){1000}){1000}$",
    ],
)
def test_hostile_patterns_end_quickly(pattern: str) -> None:
    started = time.perf_counter()
    try:
        assert not fullmatch(pattern, "a" * 120 + "b")
    except PatternError as error:
        assert "too long" in str(error)  # noqa: PT017
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("pattern", [r"(a+)+", r"((a*)*)*", r"(a|aa)+", r"(.*a){30}", r"(?:a?|b)*"])
def test_nested_repetitions_are_answered(pattern: str) -> None:
    assert Pattern(pattern, Steps(5_000)).fullmatch("a" * 60)
    assert not Pattern(pattern, Steps(5_000)).fullmatch("a" * 60 + "c")


def test_limits() -> None:
    with pytest.raises(PatternError, match="nests deeper"):
        fullmatch("(" * 60 + ")" * 60, "a")
    with pytest.raises(PatternError, match="at most 2048"):
        fullmatch("a" * 3000, "a")
    with pytest.raises(PatternError, match="more than 1000 times"):
        fullmatch("a{2000}", "a")
