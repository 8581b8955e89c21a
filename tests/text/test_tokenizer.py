"""A model directory's tokenizer: text, chats, limits, and a directory that has none."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loraplex.errors import InvalidModel, InvalidRequest
from loraplex.text.detokenize import StopText
from loraplex.text.pack import TextPack
from loraplex.text.tokenizer import ModelTokenizer, load_tokenizer
from loraplex.types import MAX_PROMPT_BYTES

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<s>' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def write_tokenizer(directory: Path, template: str = TEMPLATE) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world"], trainer)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend


def test_what_a_file_says_of_cutting_and_padding_is_for_training(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    ids = tuple(backend.encode("hello world").ids)
    backend.enable_truncation(1)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert asyncio.run(load_tokenizer(tmp_path).encode("hello world")) == ids
    assert len(ids) > 1


def test_tokenizers_that_share_a_backend_leave_it_as_it_is(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    backend.enable_truncation(2)
    base = ModelTokenizer(backend, None)
    with ThreadPoolExecutor() as threads:
        base.with_own(TextPack(chat_template="{{ messages }}"), "an adapter", threads)
    assert backend.truncation is not None, "a change would wait for whatever the base is encoding"


def test_text_and_chat(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert asyncio.run(tokenizer.encode("hello")) == tuple(backend.encode("hello").ids)
    long = "hello world " * 500
    assert asyncio.run(tokenizer.encode(long)) == tuple(backend.encode(long).ids)
    ids = asyncio.run(tokenizer.encode_chat([("user", "hello")]))
    assert ids == tuple(backend.encode("<s>user: hello\nassistant:").ids)
    assert tokenizer.token_text(ids[0]) == "<s>"
    subject = tokenizer.detokenizer(StopText())
    assert subject.push(ids)[0] + subject.flush() == "user: hello\nassistant:"


def test_template_refusal_and_absence_are_the_callers_to_mend(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="refuses it: no such role"):
        asyncio.run(load_tokenizer(tmp_path).encode_chat([("bad", "x")]))
    write_tokenizer(tmp_path, template="")
    with pytest.raises(InvalidRequest, match="no chat template"):
        asyncio.run(load_tokenizer(tmp_path).encode_chat([("user", "x")]))


def test_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest, match="refuses it"):
        asyncio.run(load_tokenizer(tmp_path).encode_chat([("user", "x")]))


RICH_TEMPLATE = """
{%- if messages[0].role == 'system' %}{{ bos_token + messages[0].content }}{% endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if loop.index0 > 3 %}{% break %}{% endif %}
    {{- '\n' + message.role + (message | tojson) + "é<>" }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt and not tools %}
assistant {{ strftime_now('%Y') }}
{% endif %}
"""


def test_template_renders_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    backend = write_tokenizer(tmp_path, RICH_TEMPLATE)
    messages = [("system", "be brief"), ("user", " hé <b>"), ("assistant", "yes "), ("user", "x"), ("user", "y")]
    ids = asyncio.run(load_tokenizer(tmp_path).encode_chat(messages))
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )
    assert "be brief" in theirs
    assert backend.decode(ids, skip_special_tokens=False) == theirs


def test_text_tokenizes_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    text = "hello <s> wörld\n\n  🙂"
    assert (
        list(asyncio.run(load_tokenizer(tmp_path).encode(text)))
        == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    )


def test_bytes_are_capped_before_tokenizing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match=f"text has {MAX_PROMPT_BYTES + 1} bytes, allowed at most"):
        asyncio.run(load_tokenizer(tmp_path).encode("a" * (MAX_PROMPT_BYTES + 1)))


def test_directory_without_tokenizer_serves_token_ids_only(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    for refused in (tokenizer.encode("x"), tokenizer.encode_chat([("user", "x")])):
        with pytest.raises(InvalidRequest, match="no tokenizer files, so it serves token_ids only"):
            asyncio.run(refused)
    with pytest.raises(InvalidRequest, match="so it serves token_ids only"):
        tokenizer.detokenizer(StopText(("x",)))
    assert tokenizer.detokenizer(StopText()).push([1, 2]) == ("", 2)
    assert tokenizer.token_text(1) == ""


def test_broken_tokenizer_files_name_the_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidModel, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)
