"""The tokenizer of one model directory: text and chats to token ids, and detokenizers back. Knows no requests.

``transformers`` reads the files; its Rust tokenizer does the work through ``encode_batch_fast``, which releases the
interpreter lock (``encode`` does not), in a thread, so that a long text never stalls the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import jinja2
from tokenizers import Tokenizer as Backend

from loraplex.errors import InvalidModel, InvalidRequest
from loraplex.text.byte_level import ByteTable
from loraplex.text.detokenize import Detokenizer, StopText, TokenStream
from loraplex.text.window import WindowTable
from loraplex.types import MAX_PROMPT_BYTES

#: any of these makes a directory one with a tokenizer
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: shorter texts tokenize in well under a millisecond: a thread would cost more than it saves
_INLINE_BYTES: Final = 1024


class TokenTable(Protocol):
    """How one tokenizer's tokens become text (``ByteTable``, ``WindowTable``)."""

    def raw(self, token_id: int) -> bytes: ...
    def open(self) -> TokenStream: ...


class Tokenizer(Protocol):
    """What the front end asks of a tokenizer."""

    async def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of ``text``, with the special tokens the model begins a text with."""
        ...

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Token ids of (role, content) messages through the model's chat template, generation prompt added."""
        ...

    def detokenizer(self, rule: StopText) -> Detokenizer:
        """A detokenizer for one request."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, special or not; U+FFFD where it is part of a character."""
        ...


class ChatTemplate(Protocol):
    """The part of a transformers tokenizer that renders chats."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class ModelTokenizer:
    """The tokenizer that a model directory ships."""

    def __init__(self, backend: Backend, special_ids: frozenset[int], template: ChatTemplate) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self._table: TokenTable = (
            ByteTable(backend, special_ids) if _is_byte_level(backend) else WindowTable(backend, special_ids)
        )

    async def encode(self, text: str) -> tuple[int, ...]:
        return await self._encode(text, "text", add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        if not self._template.chat_template:
            raise InvalidRequest("chat: this model has no chat template; send text or token_ids", field="chat")
        rendered = await asyncio.to_thread(self._render, messages)
        # The template writes the special tokens itself.
        return await self._encode(rendered, "chat", add_special_tokens=False)

    def detokenizer(self, rule: StopText) -> Detokenizer:
        return Detokenizer(self._table.open(), rule)

    def token_text(self, token_id: int) -> str:
        return self._table.raw(token_id).decode("utf-8", "replace")

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        num_bytes = len(text.encode())
        if num_bytes > MAX_PROMPT_BYTES:
            raise InvalidRequest(f"{field} has {num_bytes} bytes, allowed at most {MAX_PROMPT_BYTES}", field=field)
        if num_bytes <= _INLINE_BYTES:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            # transformers renders in jinja2's immutable sandbox.
            return self._template.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"chat: the model's chat template refuses it: {error}", field="chat") from error


class NoTokenizer:
    """Stands in where the model directory ships no tokenizer: token ids only."""

    async def encode(self, text: str) -> tuple[int, ...]:
        raise _no_tokenizer("text")

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        raise _no_tokenizer("chat")

    def detokenizer(self, rule: StopText) -> Detokenizer:
        if rule.stop:
            raise _no_tokenizer("stop.stop")
        return Detokenizer(_Silence(), rule)

    def token_text(self, token_id: int) -> str:
        return ""


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer in ``model_dir``, or ``NoTokenizer`` when it ships none.

    Raises InvalidModel when the files are there and cannot be read.
    """
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return NoTokenizer()
    # Imported late: it takes a second, and token-id-only servers and the command line do without.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidModel(f"model directory {model_dir}: its tokenizer cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise InvalidModel(f"model directory {model_dir}: {type(tokenizer).__name__} has no fast (Rust) form")
    return ModelTokenizer(tokenizer.backend_tokenizer, frozenset(tokenizer.all_special_ids), tokenizer)


class _Silence:
    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _no_tokenizer(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: this model's directory has no tokenizer files, so it serves token_ids only", field=field
    )


def _is_byte_level(backend: Backend) -> bool:
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return decoder.get("type") == "ByteLevel"
