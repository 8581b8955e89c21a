"""Incremental text equals text decoded at once, for any chunking; stop strings are found wherever they fall."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from loraplex.text.byte_level import ByteTable
from loraplex.text.detokenize import Detokenizer, StopText
from loraplex.text.stop import StopMatcher
from loraplex.text.window import WindowTable

LINES = ["the quick brown fox", "jumps over the lazy dog", "naïve café 你好 世界 🙂👩‍👩‍👧", "  spaces   and\ttabs\n"]
NO_STOP = StopText()
TEXT = st.text(
    alphabet=st.one_of(st.sampled_from("abc the你好🙂é \n"), st.characters(codec="utf-8", exclude_characters="\u2581")),
    max_size=40,
)


@functools.cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["\u2603 added"])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    vocab = {"<unk>": 0, "<eos>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    merges: list[tuple[str, str]] = []
    for piece in ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]:
        vocab[piece] = len(vocab)
    for left, right in [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("a", "b")]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def detokenizer(kind: str, rule: StopText = NO_STOP) -> Detokenizer:
    if kind == "byte_level":
        return Detokenizer(ByteTable(byte_level(), frozenset({0})).open(), rule)
    return Detokenizer(WindowTable(metaspace(), frozenset({1})).open(), rule)


def in_chunks(subject: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(subject.push(ids[start : start + size])[0])
        start += size
    return [*pieces, subject.flush()]


SIZES = st.lists(st.integers(0, 5), max_size=60)


@given(st.lists(st.integers(0, 400), max_size=60), SIZES)
def test_byte_level_equals_decoding_at_once_for_any_ids(ids: list[int], sizes: list[int]) -> None:
    whole = byte_level().decode(ids, skip_special_tokens=True)
    assert "".join(in_chunks(detokenizer("byte_level"), ids, sizes)) == whole


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(text=TEXT, sizes=SIZES)
def test_text_comes_back_and_no_character_is_split(kind: str, text: str, sizes: list[int]) -> None:
    tokenizer = byte_level() if kind == "byte_level" else metaspace()
    ids = tokenizer.encode(text).ids
    pieces = in_chunks(detokenizer(kind), ids, sizes)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, len(metaspace().get_vocab()) - 1), max_size=60), SIZES)
def test_window_text_does_not_depend_on_chunking(ids: list[int], sizes: list[int]) -> None:
    one_by_one = "".join(in_chunks(detokenizer("metaspace"), ids, [1] * len(ids)))
    assert "".join(in_chunks(detokenizer("metaspace"), ids, sizes)) == one_by_one


def test_incomplete_character_at_the_end_is_flushed_as_replacement() -> None:
    ids = byte_level().encode("🙂").ids
    assert len(ids) > 1
    subject = detokenizer("byte_level")
    assert subject.push(ids[:-1]) == ("", len(ids) - 1)
    assert subject.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(text=TEXT, sizes=SIZES, stop=st.lists(st.text(alphabet="abct he你🙂", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_one_ends(kind: str, text: str, sizes: list[int], stop: list[str]) -> None:
    ids = (byte_level() if kind == "byte_level" else metaspace()).encode(text).ids
    subject = detokenizer(kind, StopText(tuple(stop)))
    shown = "".join(in_chunks(subject, ids, sizes))
    ends = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    assert subject.stopped == bool(ends)
    assert shown == (text[: sum(min(ends))] if ends else text)


@given(st.text(alphabet="ab", max_size=12), st.text(alphabet="ab", min_size=1, max_size=3))
def test_kept_stop_string_ends_the_text(text: str, stop: str) -> None:
    matcher = StopMatcher((stop,), keep=True)
    shown = "".join(matcher.push(character) for character in text if not matcher.hit) + matcher.flush()
    assert shown == (text[: text.find(stop) + len(stop)] if stop in text else text)


def test_push_reports_the_token_that_completed_the_stop_string() -> None:
    ids = byte_level().encode("aXbc").ids
    assert len(ids) == 4
    subject = detokenizer("byte_level", StopText(("Xb",)))
    assert subject.push(ids) == ("a", 3)
    assert subject.flush() == ""


def test_stop_strings_within_min_tokens_are_passed_over() -> None:
    ids = byte_level().encode("XaXa").ids
    subject = detokenizer("byte_level", StopText(("X",), min_tokens=2))
    assert "".join(in_chunks(subject, ids, [1, 1, 1, 1])) == "Xa"
