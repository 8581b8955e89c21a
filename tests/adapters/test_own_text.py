"""What of an adapter's text files is its own, and what is refused by name. The oracle is transformers' tokenizer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.adapters.reading.source import any_directory
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.errors import InvalidAdapter, InvalidRequest, LoraplexError, Mismatch, UnsupportedFeature
from loraplex.text.pack import AdapterText
from loraplex.text.tokenizer import Tokenizer, load_tokenizer
from loraplex.types import SamplingParams
from tests.own_text import CHAT, VOCAB_SIZE, bare_adapter, chat_base, own_template, ship_generation, ship_tokenizer

TEXT = "the quick <tool> fox <end> naïve 🙂 <eos> dog"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("own-text"))


def read(base: Path, adapter: Path, *, allow: bool = True, vocab_size: int = VOCAB_SIZE) -> AdapterText | None:
    texts = OwnTexts(BaseText.read(base, (2,)), allow_templates=allow)
    return texts.read(any_directory(str(adapter)), vocab_size).own


def found(base: Path, adapter: Path, *, allow: bool = True) -> AdapterText:
    text = read(base, adapter, allow=allow)
    assert text is not None
    return text


Served = Callable[[Path, AdapterText], Tokenizer]


@pytest.fixture
def served() -> Iterator[Served]:
    """Opens what was found as a front end does."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda base, text: load_tokenizer(base).with_own(text.pack, "own", threads)


def test_added_tokens_and_template_are_those_of_transformers(base: Path, tmp_path: Path, served: Served) -> None:
    template = own_template("~")
    theirs = ship_tokenizer(base, tmp_path, ["<tool>"], special=["<end>"], template=template, eos_token="<end>")
    text = found(base, tmp_path)
    assert (text.facts.tokenizer, text.facts.chat_template) == (True, True)
    assert text.facts.eos_token_ids == (theirs.eos_token_id,)
    assert text.facts.max_token_id == max(theirs.get_vocab().values())
    ours = served(base, text)
    assert list(asyncio.run(ours.encode(TEXT))) == theirs(TEXT)["input_ids"]
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert list(asyncio.run(ours.encode_chat([(m["role"], m["content"]) for m in CHAT]))) == ids
    assert ours.token_text(theirs.convert_tokens_to_ids("<tool>")) == "<tool>"
    assert text.pack.shares_model
    assert len(text.pack.encode()) < 4096, "the vocabulary travels although it is the base's"


def test_a_tokenizer_of_another_model_travels_whole(base: Path, tmp_path: Path, served: Served) -> None:
    other = json.loads((base / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:10]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))  # nor is it laid out as the library does
    text = found(base, tmp_path)
    assert not text.pack.shares_model
    ids = asyncio.run(served(base, text).encode("the quick brown fox"))
    assert len(ids) > len(asyncio.run(load_tokenizer(base).encode("the quick brown fox")))


def test_the_same_tokenizer_laid_out_otherwise_shares_the_base_s_model(
    base: Path, tmp_path: Path, served: Served
) -> None:
    other = json.loads((base / "tokenizer.json").read_text())
    other["added_tokens"].append({**other["added_tokens"][0], "id": 330, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    text = found(base, tmp_path)
    assert text.pack.shares_model
    assert 330 in asyncio.run(served(base, text).encode("a <tool>"))


@pytest.mark.parametrize("how", ["saved again", "padded", "copied", "laid out otherwise", "none"])
def test_the_base_s_own_files_are_none_of_the_adapter_s(base: Path, tmp_path: Path, how: str) -> None:
    if how == "saved again":
        ship_tokenizer(base, tmp_path, [])
    elif how == "padded":  # as trainers do
        ship_tokenizer(base, tmp_path, [], pad_token="<eos>")
        document = json.loads((tmp_path / "tokenizer.json").read_text())
        document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    elif how == "copied":
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_bytes((base / name).read_bytes())
        ship_generation(tmp_path, eos_token_id=2, bos_token_id=1)
    elif how == "laid out otherwise":
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads((base / "tokenizer.json").read_text())))
    assert read(base, tmp_path) is None


def test_digests_tell_content_apart(base: Path, tmp_path: Path) -> None:
    digests = set()
    for index, tokens in enumerate((["<a>"], ["<b>"], ["<a>", "<b>"], ["<a>"])):
        ship_tokenizer(base, tmp_path / str(index), tokens)
        digests.add(found(base, tmp_path / str(index)).facts.digest)
    ship_generation(tmp_path / "3", eos_token_id=[2, 7])
    digests.add(found(base, tmp_path / "3").facts.digest)
    assert len(digests) == 4


def test_templates_count_only_where_they_are_allowed(base: Path, tmp_path: Path, served: Served) -> None:
    ship_tokenizer(base, tmp_path, ["<tool>"], template=own_template("~"), eos_token="<end>")
    (tmp_path / "same").mkdir()
    ship_tokenizer(base, tmp_path / "same", ["<tool>"], template=own_template("?"), eos_token="<end>")
    text = found(base, tmp_path, allow=False)
    assert (text.facts.tokenizer, text.facts.chat_template) == (True, False)
    assert text.facts.digest == found(base, tmp_path / "same", allow=False).facts.digest
    ids = asyncio.run(served(base, text).encode_chat([("user", "x")]))
    detokenized = "".join(served(base, text).token_text(token) for token in ids)
    assert detokenized == "<bos>user:Ġx\nassistant:".replace("Ġ", " ")


@pytest.mark.parametrize(
    ("values", "sampling", "eos"),
    [
        ({"eos_token_id": [9, 4]}, None, (4, 9)),
        ({"eos_token_id": 9, "temperature": 0.5}, None, (9,)),
        ({"do_sample": True}, SamplingParams(temperature=1.0, top_k=50), None),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.1},
            SamplingParams(0.6, 0.9, 0, 0.1, 1.1),
            None,
        ),
        ({"repetition_penalty": 1.2}, SamplingParams(repetition_penalty=1.2), None),
    ],
)
def test_generation_defaults(
    base: Path,
    tmp_path: Path,
    values: dict[str, object],
    sampling: SamplingParams | None,
    eos: tuple[int, ...] | None,
) -> None:
    ship_generation(tmp_path, **values)
    facts = found(base, tmp_path).facts
    assert (facts.sampling, facts.eos_token_ids, facts.tokenizer) == (sampling, eos, False)


def test_a_copy_of_the_base_s_generation_config_is_none_of_the_adapter_s(base: Path, tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "num_beams": 3, "eos_token_id": [2]}
    sampled = shutil.copytree(base, tmp_path / "base")
    ship_generation(sampled, **values)
    ship_generation(tmp_path, **values, transformers_version="0")
    assert read(sampled, tmp_path) is None
    ship_generation(tmp_path, **(values | {"temperature": 0.7}))
    assert found(sampled, tmp_path).facts.sampling == SamplingParams(temperature=0.7, top_k=50)


def test_eos_of_generation_config_stands_before_that_of_the_tokenizer(base: Path, tmp_path: Path) -> None:
    ship_tokenizer(base, tmp_path, [], eos_token="<end>")
    ship_generation(tmp_path, eos_token_id=7)
    assert found(base, tmp_path).facts.eos_token_ids == (7,)


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path, Path], None]:
    """The base's tokenizer with a change, beside an adapter."""

    def write(base: Path, adapter: Path) -> None:
        document = json.loads((base / "tokenizer.json").read_text())
        change(document)
        (adapter / "tokenizer.json").write_text(json.dumps(document))

    return write


def added(content: str, identity: int) -> dict[str, object]:
    return {
        "id": identity,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }


def replaces(pattern: object, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def writes(name: str, content: str) -> Callable[[Path, Path], None]:
    def write(base: Path, adapter: Path) -> None:
        (adapter / name).write_text(content)

    return write


def no_utf8(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_bytes(b"\xff")


def lies_in_a_pipe(base: Path, adapter: Path) -> None:
    os.mkfifo(adapter / "tokenizer.json")


REFUSALS: dict[str, tuple[Callable[[Path, Path], None], type[LoraplexError], str]] = {
    "no json": (writes("tokenizer.json", "{"), InvalidAdapter, "tokenizer cannot be used"),
    "a list": (writes("tokenizer.json", "[]"), InvalidAdapter, "tokenizer cannot be used"),
    "deep": (writes("tokenizer.json", '{"model":' * 99_999), InvalidAdapter, "tokenizer cannot be used"),
    "a pipe": (lies_in_a_pipe, InvalidAdapter, "not a regular file"),
    "config no json": (writes("tokenizer_config.json", "nope"), InvalidAdapter, "not valid JSON"),
    "config deep": (writes("tokenizer_config.json", '{"a":' * 99_999), InvalidAdapter, "tokenizer_config.json"),
    "unknown special token": (
        writes("tokenizer_config.json", '{"eos_token": "<gone>"}'),
        InvalidAdapter,
        "'<gone>' (no such token)",
    ),
    "token elsewhere": (writes("added_tokens.json", '{"<eos>": 3}'), InvalidAdapter, "'<eos>' (id 3, here 2)"),
    "decoder token elsewhere": (
        writes("tokenizer_config.json", '{"added_tokens_decoder": {"399": {"content": "<x>"}}}'),
        InvalidAdapter,
        "'<x>' (id 399, here None)",
    ),
    "ends disagree": (
        edited(lambda d: d["added_tokens"].append(added("<x>", 330))),  # type: ignore[attr-defined]
        InvalidAdapter,
        "add_eos_token is true, and its post_processor does not add '<eos>'",
    ),
    "past the vocabulary": (
        edited(lambda d: [d["added_tokens"].append(added(f"<{i}>", i)) for i in range(330, 402)]),  # type: ignore[attr-defined]
        Mismatch,
        "token '<401>' has id 401, past the vocabulary of 400 tokens",
    ),
    "long token": (
        edited(lambda d: d["added_tokens"].append(added("x" * 5000, 330))),  # type: ignore[attr-defined]
        InvalidAdapter,
        "1 to 4096 characters",
    ),
    "growth": (
        edited(lambda d: d.update(normalizer=replaces({"String": "a"}, "a" * 65))),
        InvalidAdapter,
        "normalizer makes text up to 65 times longer",
    ),
    "growth by steps": (
        edited(
            lambda d: d.update(
                normalizer={"type": "Sequence", "normalizers": [replaces({"String": "a"}, "aaa")] * 4},
            )
        ),
        InvalidAdapter,
        "81 times longer",
    ),
    "decoder by expression": (
        edited(lambda d: d.update(decoder=replaces({"Regex": "(a+)+$"}, ""))),
        UnsupportedFeature,
        "decoder with a regular expression",
    ),
    "older format": (writes("vocab.json", "{}"), UnsupportedFeature, "save it as tokenizer.json"),
    "template": (writes("chat_template.jinja", "{% for %}"), InvalidAdapter, "chat template does not compile"),
    "template not text": (
        no_utf8,
        InvalidAdapter,
        "chat_template.jinja: not UTF-8",
    ),
    "beams": (writes("generation_config.json", '{"num_beams": 4}'), UnsupportedFeature, "num_beams '4' is not served"),
    "temperature": (
        writes("generation_config.json", '{"do_sample": true, "temperature": 1e9}'),
        InvalidAdapter,
        "temperature 1000000000.0 is out of range",
    ),
    "top_k": (
        writes("generation_config.json", '{"do_sample": true, "top_k": 1e30}'),
        InvalidAdapter,
        "top_k 1e+30 is out of range",
    ),
    "temperature text": (
        writes("generation_config.json", '{"do_sample": true, "temperature": "hot"}'),
        InvalidAdapter,
        "temperature is 'hot', expected a number",
    ),
    "eos text": (writes("generation_config.json", '{"eos_token_id": "x"}'), InvalidAdapter, "eos_token_id is x"),
    "eos past the vocabulary": (
        writes("generation_config.json", '{"eos_token_id": [2, 400]}'),
        Mismatch,
        "eos_token_id 400 is past the vocabulary of 400 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(base: Path, tmp_path: Path, name: str) -> None:
    write, error, message = REFUSALS[name]
    adapter = bare_adapter(tmp_path, "fr")
    write(base, adapter)
    if name == "ends disagree":
        (adapter / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "add_eos_token": true}')
    with pytest.raises(error) as caught:
        read(base, adapter)
    assert message in str(caught.value)
    assert "fr" in str(caught.value)


def matching(base: Path, adapter: Path, expression: str) -> Path:
    """A tokenizer that splits by an expression first."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    edited(lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, d["pre_tokenizer"]]}))(
        base, adapter
    )
    return adapter


def test_an_expression_that_explodes_is_given_up(base: Path, tmp_path: Path, served: Served) -> None:
    with pytest.raises(InvalidAdapter, match="cannot be used: Onig: Regex search error: retry-limit"):
        read(base, matching(base, tmp_path, "(a+)+b"))
    ours = served(base, found(base, matching(base, tmp_path, "(z+)+b")))
    with pytest.raises(InvalidRequest, match=r"text: the tokenizer fails: .*retry-limit"):
        asyncio.run(ours.encode("z" * 64))
    assert len(asyncio.run(ours.encode("the fox"))) > 1


def test_an_adapter_of_a_base_without_tokenizer_brings_one(base: Path, tmp_path: Path, served: Served) -> None:
    plain = bare_adapter(tmp_path, "plain-base")
    adapter = bare_adapter(tmp_path, "adapter")
    theirs = ship_tokenizer(base, adapter, ["<tool>"], template=own_template("~"))
    text = found(plain, adapter)
    ours = served(plain, text)
    assert list(asyncio.run(ours.encode(TEXT))) == theirs(TEXT)["input_ids"]
    assert len(asyncio.run(ours.encode_chat([("user", "x")]))) > 3


def test_a_template_that_is_not_allowed_is_told_of(base: Path, tmp_path: Path) -> None:
    for template, unused in ((own_template("!"), True), (None, False)):  # None: the base's own, copied
        adapter = bare_adapter(tmp_path, "fr")
        ship_tokenizer(base, adapter, [], template=template)
        for allow in (False, True):
            texts = OwnTexts(BaseText.read(base, (2,)), allow_templates=allow)
            assert texts.read(any_directory(str(adapter)), VOCAB_SIZE).template_unused == (unused and not allow)


def test_invocation_tokens_are_spelled_by_the_adapters_tokenizer(base: Path, tmp_path: Path) -> None:
    theirs = ship_tokenizer(base, tmp_path, ["<tool>"], special=["<end>"])
    texts = OwnTexts(BaseText.read(base, (2,)), allow_templates=False)
    ids = theirs(" fox<end><tool> naïve 🙂")["input_ids"]
    assert texts.read(any_directory(str(tmp_path)), VOCAB_SIZE, ids).invocation == " fox<end><tool> naïve 🙂"
    assert texts.read(any_directory(str(tmp_path)), VOCAB_SIZE).invocation == ""
