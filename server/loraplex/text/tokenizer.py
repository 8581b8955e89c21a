"""The tokenizer of one model directory: text and chats to token ids, and detokenizers back. Knows no requests.

The Rust tokenizer reads tokenizer.json itself: transformers would bring torch, 340 MB and 2.5 s, into the front end.
It is asked through ``encode_batch_fast``, which releases the interpreter lock (``encode`` does not), in a thread, so
that a long text never stalls the event loop. Tokenizers of adapters always work in threads, which are their own: how
long they take is up to files that the operator did not write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, Protocol, TypeVar

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel

from loraplex.errors import InvalidModel, InvalidRequest
from loraplex.text.byte_level import ByteTable
from loraplex.text.chat import ChatTemplate, read_chat_template
from loraplex.text.detokenize import Detokenizer, StopText, TokenStream
from loraplex.text.pack import TextPack
from loraplex.text.tokenizer_parts import on_model, tokenizer_errors
from loraplex.text.window import WindowTable
from loraplex.types import MAX_PROMPT_BYTES

#: a directory without tokenizer.json that has one of these is converted
OLDER_FILES: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: shorter texts tokenize in well under a millisecond: a thread would cost more than it saves
_INLINE_BYTES: Final = 1024
#: threads that one adapter's tokenizer may hold at once
_MAX_OWN_THREADS: Final = 2

Result = TypeVar("Result")


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

    def with_own(self, pack: TextPack, owner: str, threads: Executor) -> Tokenizer:
        """The tokenizer of an adapter that ships text of its own; what it leaves out is this one's.

        It works in ``threads``. Raises InvalidModel, naming ``owner``, when the pack cannot be used.
        """
        ...


class ModelTokenizer:
    """A tokenizer that a model directory, or an adapter, ships. ``threads``: where an adapter's works.

    ``backend`` neither cuts nor pads, and is never changed: several of these may share it, and a change would wait for
    whatever another is encoding, and everybody for it.
    """

    def __init__(self, backend: Backend, template: ChatTemplate | None, threads: Executor | None = None) -> None:
        special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self._backend = backend
        self._template = template
        self._table: TokenTable = (
            ByteTable(backend, special_ids)
            if isinstance(backend.decoder, ByteLevel)
            else WindowTable(backend, special_ids)
        )
        self._threads = threads
        self._turns = asyncio.Semaphore(_MAX_OWN_THREADS)

    async def encode(self, text: str) -> tuple[int, ...]:
        return await self._encode(text, "text", add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            raise InvalidRequest("chat: this model has no chat template; send text or token_ids", field="chat")
        template = self._template
        rendered = await self._in_thread(lambda: template.render(messages))
        # The template writes the special tokens itself.
        return await self._encode(rendered, "chat", add_special_tokens=False)

    def detokenizer(self, rule: StopText) -> Detokenizer:
        return Detokenizer(self._table.open(), rule)

    def token_text(self, token_id: int) -> str:
        return self._table.raw(token_id).decode("utf-8", "replace")

    def with_own(self, pack: TextPack, owner: str, threads: Executor) -> Tokenizer:
        if pack.is_empty:
            return self
        backend = self._backend if pack.tokenizer is None else own_backend(pack, self._backend, owner)
        return ModelTokenizer(backend, own_template(pack, self._template, owner), threads)

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        num_bytes = len(text.encode())
        if num_bytes > MAX_PROMPT_BYTES:
            raise InvalidRequest(f"{field} has {num_bytes} bytes, allowed at most {MAX_PROMPT_BYTES}", field=field)
        if num_bytes <= _INLINE_BYTES and self._threads is None:
            return self._encode_now(text, field, add_special_tokens)
        return await self._in_thread(lambda: self._encode_now(text, field, add_special_tokens))

    def _encode_now(self, text: str, field: str, add_special_tokens: bool) -> tuple[int, ...]:
        with tokenizer_errors(lambda reason: InvalidRequest(f"{field}: the tokenizer fails: {reason}", field=field)):
            return tuple(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        if self._threads is None:
            return await asyncio.to_thread(work)
        async with self._turns:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)


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

    def with_own(self, pack: TextPack, owner: str, threads: Executor) -> Tokenizer:
        if pack.tokenizer is None:
            return self
        return ModelTokenizer(own_backend(pack, None, owner), own_template(pack, None, owner), threads)


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer in ``model_dir``, or ``NoTokenizer`` when it ships none.

    Raises InvalidModel when the files are there and cannot be read.
    """
    backend = read_backend(model_dir)
    return NoTokenizer() if backend is None else ModelTokenizer(backend, read_chat_template(model_dir))


def read_backend(model_dir: Path) -> Backend | None:
    """The library's tokenizer in ``model_dir``, None when it ships none. Raises InvalidModel."""
    file = model_dir / "tokenizer.json"
    if file.is_file():
        return _whole(_read_backend(file))
    if any((model_dir / name).is_file() for name in OLDER_FILES):
        return _whole(_converted_backend(model_dir))
    return None


def own_backend(pack: TextPack, base: Backend | None, owner: str) -> Backend:
    """The library's tokenizer of a pack that has one."""
    assert pack.tokenizer is not None
    with tokenizer_errors(lambda reason: InvalidModel(f"{owner}: its tokenizer cannot be read: {reason}")):
        if not pack.shares_model:
            return _whole(Backend.from_buffer(pack.tokenizer))
        assert base is not None, "a pack shares the model of a base that has none"
        return on_model(pack.tokenizer, base.model)


def own_template(pack: TextPack, base: ChatTemplate | None, owner: str) -> ChatTemplate | None:
    """The template of a pack, else the base's with the pack's special tokens."""
    special_tokens = pack.special_tokens
    if special_tokens is None:
        special_tokens = {} if base is None else base.special_tokens
    if pack.chat_template is not None:
        return ChatTemplate(pack.chat_template, special_tokens, owner)
    return None if base is None else ChatTemplate(base.source, special_tokens)


class _Silence:
    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _whole(backend: Backend) -> Backend:
    """Texts as they are: what a file says of cutting and padding is for training."""
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_backend(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception for a malformed file
        raise InvalidModel(f"{file}: its tokenizer cannot be read: {error}") from error


def _converted_backend(model_dir: Path) -> Backend:
    """The Rust form of an older format, converted by transformers."""
    # Imported only for these: see above.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        backend: Backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise InvalidModel(f"model directory {model_dir}: its tokenizer cannot be converted: {error}") from error
    return backend


def _no_tokenizer(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: this model's directory has no tokenizer files, so it serves token_ids only", field=field
    )
