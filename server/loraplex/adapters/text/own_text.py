"""The text files that an adapter ships, checked and cut down to what differs from the base's. Runs in a loader thread.

What is equal to the base's is none of the adapter's own: trainers copy the base's tokenizer beside every adapter. What
remains becomes a ``TextPack`` for front ends and ``OwnText`` for everybody else. Tokenizers are tried here once, with
the code that will serve them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from tokenizers import Tokenizer as Backend

from loraplex.adapters.reading.source import AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.adapters.routing.vocabulary import vocabulary_digest
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.generation_defaults import GenerationDefaults, read_generation_defaults
from loraplex.adapters.text.token_settings import TokenSettings, check_ids, read_token_settings
from loraplex.adapters.text.tokenizer_limits import MAX_TOKEN_CHARS, check_document
from loraplex.errors import InvalidAdapter, InvalidModel, LoraplexError, Mismatch, UnsupportedFeature
from loraplex.text.pack import AdapterText, TextPack, digest_of
from loraplex.text.tokenizer import OLDER_FILES, own_backend, own_template
from loraplex.text.tokenizer_parts import split_document, tokenizer_errors
from loraplex.types import OwnText

TOKENIZER_FILE: Final = "tokenizer.json"
_MAX_TOKENIZER_BYTES: Final = 64 << 20
#: how long a tokenizer may take over a few words
_TRIAL_S: Final = 10.0
_TRIAL_TEXT: Final = "Hello, world! 12345\n\t  don't naïve 你好 🙂 " + "a" * 64 + " " * 64


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenizer of an adapter: as it travels, and read. ``document`` is None where it is the base's."""

    backend: Backend
    document: bytes | None
    shares_model: bool


@dataclass(frozen=True, slots=True)
class TextFound:
    """What a directory ships. ``own``: None when nothing differs from the base's. ``template_unused``: a chat template
    of its own that is not allowed. ``invocation``: the adapter's invocation tokens as text."""

    own: AdapterText | None
    template_unused: bool = False
    invocation: str = ""

    @property
    def digest(self) -> bytes:
        """What of it makes the adapter another one."""
        return b"" if self.own is None else self.own.facts.digest.encode()


NO_TEXT: Final = TextFound(None)


class OwnTexts:
    """Reads adapters' text against one base's. ``allow_templates``: whether their chat templates count."""

    def __init__(self, base: BaseText, *, allow_templates: bool) -> None:
        self._base = base
        self._allow_templates = allow_templates

    def vocabulary(self) -> str:
        """The digest of the base's vocabulary; empty where it ships no tokenizer."""
        return vocabulary_digest(self._base.backend)

    def read(self, directory: AdapterDir, vocab_size: int, invocation_tokens: Sequence[int] = ()) -> TextFound:
        """What ``directory`` ships of its own.

        ``vocab_size``: the tokens that the adapter knows, those it adds included.

        Raises:
            InvalidAdapter: files that are malformed, or disagree with each other.
            Mismatch: a token past the vocabulary.
            UnsupportedFeature: a tokenizer in an older format than tokenizer.json, or a way to generate, by name.
        """
        defaults = read_generation_defaults(directory, vocab_size, self._base.generation)
        settings = read_token_settings(directory)
        tokens = self._tokens(directory, settings)
        if tokens is not None:
            self._check(tokens, settings, directory, vocab_size)
        return TextFound(
            own=self._own(tokens, settings, defaults, directory.shown),
            template_unused=not self._allow_templates and self._differs(settings.chat_template),
            invocation=_spelled(invocation_tokens, tokens, directory.where(TOKENIZER_FILE)),
        )

    def _own(
        self, tokens: _Tokens | None, settings: TokenSettings, defaults: GenerationDefaults, shown: str
    ) -> AdapterText | None:
        pack = self._pack(tokens, settings, shown)
        eos = self._eos(defaults, settings, tokens)
        if pack.is_empty and eos is None and defaults.sampling is None:
            return None
        rest = msgspec.json.encode((eos, defaults.sampling))
        return AdapterText(
            OwnText(
                digest=digest_of(pack.encode(), rest),
                tokenizer=pack.tokenizer is not None,
                chat_template=pack.chat_template is not None,
                max_token_id=self._base.max_token_id if tokens is None else _largest(tokens, self._base)[0],
                eos_token_ids=eos,
                sampling=defaults.sampling,
            ),
            pack,
        )

    # ---- the tokenizer ----

    def _tokens(self, directory: AdapterDir, settings: TokenSettings) -> _Tokens | None:
        """The tokenizer that the directory's files make; None: neither it nor the base has one."""
        base = self._base
        if directory.has(TOKENIZER_FILE):
            raw = read_small_file(directory, TOKENIZER_FILE, _MAX_TOKENIZER_BYTES)
            where = directory.where(TOKENIZER_FILE)
            if not base.has_file(TOKENIZER_FILE, raw):
                return _within(_TRIAL_S, lambda: self._own_tokens(raw, settings, where), where)
        else:
            self._refuse_older(directory)
        return None if base.backend is None else _Tokens(base.backend, None, True)

    def _own_tokens(self, raw: bytes, settings: TokenSettings, where: str) -> _Tokens:
        base = self._base
        parts = split_document(raw)
        if parts is None or not base.has_model(parts[1]):
            with tokenizer_errors(lambda reason: _unreadable(where, reason)):
                raw = Backend.from_buffer(raw).to_str(pretty=True).encode()
            parts = split_document(raw)
            assert parts is not None, "the library writes what it says"
        head = parse_object(parts[0], where)
        if head.get("model", 0) is not None:
            raise InvalidAdapter(f"{where}: its model is not at the top level")
        check_document(head, base.heads[0] if base.heads else {}, where)
        shares = base.has_model(parts[1])
        if shares and base.has_head(head):
            assert base.backend is not None
            return _Tokens(base.backend, None, True)
        with tokenizer_errors(lambda reason: _unreadable(where, reason)):
            if shares:  # nothing here may cost what reading or writing the vocabulary does
                assert base.backend is not None
                document = _with_special(head, settings, base.backend)
                backend = own_backend(TextPack(document, True), base.backend, where)
            else:
                backend = own_backend(TextPack(raw), None, where)
                backend.add_special_tokens(_unmarked(settings, _added_of(backend), backend))
                document = backend.to_str(pretty=True).encode()
            _try(backend)
        return _Tokens(backend, document, shares)

    def _refuse_older(self, directory: AdapterDir) -> None:
        for name in OLDER_FILES:
            if not directory.has(name):
                continue
            if not self._base.has_file(name, read_small_file(directory, name, _MAX_TOKENIZER_BYTES)):
                raise UnsupportedFeature(
                    f"{directory.where(name)}: a tokenizer of its own in this format is not served; save it as "
                    f"{TOKENIZER_FILE} (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or take it out",
                    field=name,
                )

    def _check(self, tokens: _Tokens, settings: TokenSettings, directory: AdapterDir, vocab_size: int) -> None:
        """Refuse tokens past the vocabulary, and settings that the tokenizer does not bear out."""
        mentioned = {*settings.ids, *settings.named()}
        # what the base's own files name without having it is not the adapter's to mend
        lacking = [t for t in self._base.special_tokens.values() if tokens.backend.token_to_id(t) is None]
        known = {token: id for token in mentioned if (id := tokens.backend.token_to_id(token)) is not None}
        check_ids(settings, {**dict.fromkeys(lacking, -1), **known}, directory.shown)
        if tokens.document is None:
            return
        where = directory.where(TOKENIZER_FILE)
        largest, token = _largest(tokens, self._base)
        if largest >= vocab_size and largest > self._base.max_token_id:
            raise Mismatch(
                f"{where}: token {token[:80]!r} has id {largest}, past the vocabulary of {vocab_size} tokens: an "
                f"adapter must bring the embeddings of tokens that it adds"
            )
        self._check_ends(tokens, settings, where)

    def _check_ends(self, tokens: _Tokens, settings: TokenSettings, where: str) -> None:
        """What add_bos_token and add_eos_token say must be what the post-processor does."""
        ids = tokens.backend.encode_batch_fast(["a"], add_special_tokens=True)[0].ids
        for key, wanted in settings.adds.items():
            name = key.removeprefix("add_")
            token = (settings.special or {}).get(name, "")
            identity = tokens.backend.token_to_id(token) if token else None
            there = identity is not None and ids[0 if name == "bos_token" else -1] == identity
            if there != (wanted and identity is not None):
                raise InvalidAdapter(
                    f"{where}: {key} is {str(wanted).lower()}, and its post_processor does "
                    f"{'' if there else 'not '}add {token!r}; save the tokenizer again with save_pretrained()"
                )

    # ---- the rest ----

    def _pack(self, tokens: _Tokens | None, settings: TokenSettings, shown: str) -> TextPack:
        base = self._base
        source = settings.chat_template if self._allow_templates else ""
        changed = self._differs(source)
        rendered = source if changed else base.template.source if base.template is not None else ""
        pack = TextPack(
            tokenizer=None if tokens is None else tokens.document,
            shares_model=tokens is not None and tokens.document is not None and tokens.shares_model,
            chat_template=source if changed else None,
            special_tokens=_own_special(settings, base, rendered),
        )
        try:
            own_template(pack, base.template, shown)
        except InvalidModel as error:
            raise InvalidAdapter(str(error)) from None
        return pack

    def _differs(self, template: str) -> bool:
        base = self._base.template
        return bool(template) and (base is None or template != base.source)

    def _eos(
        self, defaults: GenerationDefaults, settings: TokenSettings, tokens: _Tokens | None
    ) -> tuple[int, ...] | None:
        """Its end-of-sequence tokens where they are not the base's: of generation_config.json, else its eos_token."""
        base = self._base.eos_token_ids
        if defaults.eos_token_ids is not None:
            return None if set(defaults.eos_token_ids) == set(base) else defaults.eos_token_ids
        token = (settings.special or {}).get("eos_token")
        identity = None if token is None or tokens is None else tokens.backend.token_to_id(token)
        return None if identity is None or identity in base else (identity,)


def _own_special(settings: TokenSettings, base: BaseText, template: str) -> dict[str, str] | None:
    """The special tokens that a template names, None where they are the base's. Nothing else reads them: a padding
    token, which trainers often set, makes no text of its own."""
    if settings.special is None:
        return None
    own = {name: token for name, token in settings.special.items() if name in template}
    return None if own == {name: token for name, token in base.special_tokens.items() if name in template} else own


def _spelled(token_ids: Sequence[int], tokens: _Tokens | None, where: str) -> str:
    """Token ids as text, special tokens with it; empty without a tokenizer."""
    if tokens is None or not token_ids:
        return ""
    with tokenizer_errors(lambda reason: _unreadable(where, reason)):
        return tokens.backend.decode(list(token_ids), skip_special_tokens=False)


def _unmarked(settings: TokenSettings, added: Collection[str], vocabulary: Backend) -> list[str]:
    """Special tokens that stand in the vocabulary alone: transformers matches them whole, as it does added ones."""
    return [t for t in settings.named() if t not in added and vocabulary.token_to_id(t) is not None]


def _with_special(head: Mapping[str, object], settings: TokenSettings, base: Backend) -> bytes:
    """A document without its model, special tokens of the vocabulary among the added ones; equal for equal content."""
    added = head["added_tokens"]
    assert isinstance(added, list), "check_document saw a list"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [
        {"id": base.token_to_id(token), "content": token, **flags}
        for token in _unmarked(settings, {item["content"] for item in added}, base)
    ]
    document = {**head, "truncation": None, "padding": None, "added_tokens": [*added, *more]}
    return json.dumps(document, sort_keys=True).encode()


def _added_of(backend: Backend) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _try(backend: Backend) -> None:
    """Use it once, as it will be used."""
    added = sorted(_added_of(backend))
    ids = backend.encode_batch_fast([_TRIAL_TEXT + " ".join(added[-64:])], add_special_tokens=True)[0].ids
    backend.decode(ids, skip_special_tokens=True)


def _largest(tokens: _Tokens, base: BaseText) -> tuple[int, str]:
    """The largest id of a tokenizer, and its token. Raises InvalidAdapter: a token too long to be served."""
    if tokens.document is None:
        return base.max_token_id, ""
    if tokens.shares_model:
        added = ((id, token.content) for id, token in tokens.backend.get_added_tokens_decoder().items())
        return max((base.max_token_id, ""), *added)
    vocabulary = tokens.backend.get_vocab(with_added_tokens=True)
    longest = max(vocabulary, key=len, default="")
    if len(longest) > MAX_TOKEN_CHARS:
        raise InvalidAdapter(f"token {longest[:40]!r}... has {len(longest)} characters; allowed are {MAX_TOKEN_CHARS}")
    return max(((id, token) for token, id in vocabulary.items()), default=(-1, ""))


def _within(seconds: float, work: Callable[[], _Tokens], where: str) -> _Tokens:
    """What ``work`` gives, from a thread that is left behind when it takes too long."""
    found: list[_Tokens] = []
    failed: list[LoraplexError] = []

    def run() -> None:
        try:
            with tokenizer_errors(lambda reason: _unreadable(where, reason)):
                found.append(work())
        except LoraplexError as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tokenizer-trial", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise InvalidAdapter(f"{where}: the tokenizer took longer than {seconds:g} s over a few words")
    return found[0]


def _unreadable(where: str, reason: str) -> InvalidAdapter:
    return InvalidAdapter(f"{where}: its tokenizer cannot be used: {reason}")
