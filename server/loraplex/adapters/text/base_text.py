"""The base model's own text, as an adapter's is compared with it: tokenizer, template, special tokens, eos tokens.

Read once when the engine is built; used in the loader's thread. The tokenizer is the engine's own copy: it checks
adapters' tokenizers here, before a front end sees them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from loraplex.errors import InvalidModel
from loraplex.text.chat import ChatTemplate, read_chat_template, read_tokenizer_config, special_tokens_of
from loraplex.text.tokenizer import read_backend
from loraplex.text.tokenizer_parts import split_document


@dataclass(frozen=True, slots=True)
class BaseText:
    """``backend`` is None where the base ships no tokenizer; ``generation`` is its generation_config.json.

    ``heads``: its tokenizer.json without the model, as the file has it and as the library writes it;
    ``model_digests``: of the model, in both spellings. ``max_token_id``: the largest id its tokenizer gives, -1 without
    one.
    """

    directory: Path
    eos_token_ids: tuple[int, ...]
    backend: Backend | None
    template: ChatTemplate | None
    special_tokens: Mapping[str, str]
    generation: Mapping[str, object]
    heads: tuple[Mapping[str, object], ...]
    model_digests: frozenset[str]
    max_token_id: int

    @classmethod
    def read(cls, model_dir: Path, eos_token_ids: tuple[int, ...]) -> BaseText:
        """What ``model_dir`` ships. Raises InvalidModel when its files cannot be used."""
        is_directory = model_dir.is_dir()  # a GGUF file served as it is has none of these
        backend = read_backend(model_dir) if is_directory else None
        template = read_chat_template(model_dir) if is_directory else None
        spellings: list[tuple[bytes, bytes]] = []
        if backend is not None:
            file = model_dir / "tokenizer.json"
            documents = [backend.to_str(pretty=True).encode(), *([file.read_bytes()] if file.is_file() else [])]
            spellings = [parts for raw in documents if (parts := split_document(raw)) is not None]
        return cls(
            model_dir,
            eos_token_ids,
            backend,
            template,
            special_tokens_of(read_tokenizer_config(model_dir)) if is_directory else {},
            _generation(model_dir),
            tuple(json.loads(head) for head, _ in spellings),
            frozenset(hashlib.sha256(model).hexdigest() for _, model in spellings),
            -1 if backend is None else max(backend.get_vocab(with_added_tokens=True).values(), default=-1),
        )

    def has_model(self, model: bytes) -> bool:
        """Whether this end of a tokenizer.json is that of the base's."""
        return hashlib.sha256(model).hexdigest() in self.model_digests

    def has_head(self, head: Mapping[str, object]) -> bool:
        """Whether a tokenizer.json without its model is the base's; what it says of padding is not looked at."""
        return _compared(head) in [_compared(known) for known in self.heads]

    def has_file(self, name: str, content: bytes) -> bool:
        """Whether the base ships this very file."""
        file = self.directory / name
        return file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content


def _generation(model_dir: Path) -> Mapping[str, object]:
    file = model_dir / "generation_config.json"
    try:
        values = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise InvalidModel(f"{file} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _compared(head: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in head.items() if key not in ("version", "truncation", "padding", "model")}
