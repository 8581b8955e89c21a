"""What an adapter's tokenizer_config.json, special_tokens_map.json and added_tokens.json say of single tokens.

tokenizer.json is what tokenizes; these name its special tokens. transformers adds to a tokenizer what they name and it
lacks (``tokenization_utils_tokenizers.py``); here a token without an id of its own is refused instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from loraplex.adapters.reading.source import AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.errors import InvalidAdapter
from loraplex.text.chat import special_tokens_of, template_of

CONFIG: Final = "tokenizer_config.json"
SPECIAL_MAP: Final = "special_tokens_map.json"
ADDED: Final = "added_tokens.json"
TEMPLATE: Final = "chat_template.jinja"
_MAX_JSON_BYTES: Final = 8 << 20
_MAX_TEMPLATE_BYTES: Final = 1 << 20
_EXTRA_KEYS: Final = ("additional_special_tokens", "extra_special_tokens")
_TOKENS_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """``special``: by name (``eos_token``), None where the directory ships neither config nor map. ``extra``: special
    tokens without a name. ``ids``: token -> the id that the files give it. ``adds``: ``add_bos_token`` and
    ``add_eos_token`` as far as they are set. ``chat_template``: empty without one.
    """

    special: Mapping[str, str] | None = None
    extra: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str = ""

    def named(self) -> tuple[str, ...]:
        """Every special token, once."""
        return tuple(dict.fromkeys((*(self.special or {}).values(), *self.extra)))


def read_token_settings(directory: AdapterDir) -> TokenSettings:
    """The settings in ``directory``. Raises InvalidAdapter naming the file: not JSON, not UTF-8, too large."""
    config = _object(directory, CONFIG)
    mapped = _object(directory, SPECIAL_MAP)
    values = {**(mapped or {}), **(config or {})}
    shipped = config is not None or mapped is not None
    template = _template(directory)
    return TokenSettings(
        special=special_tokens_of(values) if shipped else None,
        extra=tuple(token for key in _EXTRA_KEYS for token in _texts(values.get(key))),
        ids={**_decoder_ids(config or {}, directory), **_added_ids(directory)},
        adds={key: values[key] is True for key in ("add_bos_token", "add_eos_token") if values.get(key) is not None},
        chat_template=template_of(values) if template is None else template,
    )


def check_ids(settings: TokenSettings, id_of: Mapping[str, int], where: str) -> None:
    """Refuse settings that speak of tokens which the tokenizer does not have, or has elsewhere.

    Raises InvalidAdapter naming the first few.
    """
    wrong = [f"{token!r} (id {want}, here {id_of.get(token)})" for token, want in settings.ids.items()
             if id_of.get(token) != want]  # fmt: skip
    wrong += [f"{token!r} (no such token)" for token in settings.named() if token not in id_of]
    if wrong:
        more = f" and {len(wrong) - _TOKENS_SHOWN} more" if len(wrong) > _TOKENS_SHOWN else ""
        raise InvalidAdapter(
            f"{where}: tokens that its tokenizer does not have: {', '.join(wrong[:_TOKENS_SHOWN])}{more}; save the "
            f"tokenizer with save_pretrained(), which writes them to tokenizer.json"
        )


def _object(directory: AdapterDir, file: str) -> dict[str, object] | None:
    if not directory.has(file):
        return None
    return parse_object(read_small_file(directory, file, _MAX_JSON_BYTES), directory.where(file))


def _template(directory: AdapterDir) -> str | None:
    if not directory.has(TEMPLATE):
        return None
    try:
        return read_small_file(directory, TEMPLATE, _MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidAdapter(f"{directory.where(TEMPLATE)}: not UTF-8") from None


def _decoder_ids(config: Mapping[str, object], directory: AdapterDir) -> dict[str, int]:
    """Token -> id of ``added_tokens_decoder``."""
    decoder = config.get("added_tokens_decoder") or {}
    where = directory.where(CONFIG)
    if not isinstance(decoder, dict):
        raise InvalidAdapter(f"{where}: added_tokens_decoder is {type(decoder).__name__}, expected an object")
    ids: dict[str, int] = {}
    for key, value in decoder.items():
        texts = tuple(_texts([value]))
        if not texts or not key.isascii() or not key.isdigit() or len(key) > 9:
            raise InvalidAdapter(f"{where}: added_tokens_decoder: {key[:40]!r} is no id of a token with content")
        ids[texts[0]] = int(key)
    return ids


def _added_ids(directory: AdapterDir) -> dict[str, int]:
    """Token -> id of added_tokens.json."""
    values = _object(directory, ADDED) or {}
    ids = {token: value for token, value in values.items() if type(value) is int}
    if len(ids) < len(values):
        raise InvalidAdapter(f"{directory.where(ADDED)}: expected an id for each token")
    return ids


def _texts(value: object) -> Iterable[str]:
    """The tokens in a list or an object of them, plain or with their ``content``."""
    items: Iterable[object] = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    for item in items:
        text = item.get("content") if isinstance(item, dict) else item
        if isinstance(text, str) and text:
            yield text
