"""A tiny base with a tokenizer as transformers saves it, and adapters that ship tokenizers made by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tests.tiny import tiny_checkpoint

#: rows of the model's embedding: more than its tokenizer has tokens
VOCAB_SIZE = 400
SPECIAL = ["<pad>", "<bos>", "<eos>"]
LINES = ["the quick brown fox jumps over the lazy dog", "naïve café 你好 世界 🙂", "assistant user system"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick <tool> fox"}]


def chat_base(root: Path, arch: str = "llama", **overrides: object) -> Path:
    """A checkpoint whose tokenizer leaves rows to spare, made once below ``root``."""
    path = tiny_checkpoint(root, arch, vocab_size=VOCAB_SIZE, **overrides)
    if (path / "tokenizer.json").is_file():
        return path
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 4, trainer)
    backend.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    AutoTokenizer.from_pretrained(str(path)).save_pretrained(str(path))
    return path


def own_template(mark: str) -> str:
    """A template that no other has."""
    return (
        "{{ bos_token }}" + mark + "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )


def ship_tokenizer(
    base: Path,
    adapter: Path,
    tokens: Sequence[str],
    *,
    special: Sequence[str] = (),
    template: str | None = None,
    **named: str,
) -> Any:
    """Save the base's tokenizer with these tokens added beside an adapter, as a trainer does; returns it.

    ``named``: special tokens by name (``eos_token``), added where they are new.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_tokens(list(tokens))
    if special:
        tokenizer.add_tokens(list(special), special_tokens=True)
    if named:
        tokenizer.add_special_tokens(named)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(adapter))
    return AutoTokenizer.from_pretrained(str(adapter))


def ship_generation(adapter: Path, **values: object) -> None:
    """A generation_config.json beside an adapter."""
    (adapter / "generation_config.json").write_text(json.dumps(values))


def bare_adapter(root: Path, name: str) -> Path:
    """A directory for text files alone: nothing reads its weights."""
    path = root / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
