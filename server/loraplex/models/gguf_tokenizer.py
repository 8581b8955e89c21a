"""GGUF vocabulary -> `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

Owns the one thing transformers' GGUF reader leaves out: which regular expression splits text before byte-pair
merging. GGUF names it in `tokenizer.ggml.pre`; transformers reads the vocabulary, merges, special tokens and chat
template, and gives every byte-level vocabulary GPT-2's splitter, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from loraplex.errors import ConversionFailed

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    return lambda: Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


# Keys are llama.cpp's names (`get_vocab_base_pre` in convert_hf_to_gguf.py).
_PRE_TOKENIZERS: Mapping[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _digits_then_gpt2,
    "llama-bpe": _split(_LLAMA3_SPLIT),
    "qwen2": _split(_QWEN2_SPLIT),
}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the file says of its tokenizer: `tokenizer.ggml.{model,pre,add_bos_token}`, and the context length."""

    model: str
    pre: str
    add_bos: bool
    context_length: int


def convert_tokenizer(gguf_path: Path, facts: TokenizerFacts, out_dir: Path) -> None:
    """Write the tokenizer files of `gguf_path` into `out_dir`.

    Raises:
        ConversionFailed: the vocabulary is not byte-level, its splitter is unknown, transformers cannot read it, or the
            disk refused a write.
    """
    where = f"{gguf_path.name!r}: tokenizer"
    if facts.model != "gpt2":
        raise ConversionFailed(f"{where} model is {facts.model!r}; only 'gpt2' (byte-level) is supported")
    if facts.pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ConversionFailed(f"{where} pre-tokenizer {facts.pre!r} is unknown; known are {known}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionFailed(f"{where} cannot be read: {error}") from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise ConversionFailed(f"{where} became a {type(tokenizer).__name__}, which has no tokenizer.json")
    tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[facts.pre]()
    tokenizer.add_bos_token = facts.add_bos
    tokenizer.model_max_length = facts.context_length
    try:
        tokenizer.save_pretrained(out_dir)
    except Exception as error:  # the Rust side raises plain Exception when the disk refuses a write
        raise ConversionFailed(f"{where} cannot be written to {str(out_dir)!r}: {error}") from error
