"""Chat templates: the model's own Jinja template, rendered in a sandbox as transformers renders it. Knows no tokens.

The names a template may use (``raise_exception``, ``strftime_now``, ``tojson``, ``{% generation %}``, loop controls)
are those of transformers' ``chat_template_utils``. The sandbox keeps a template from reaching Python; it does not bound
time or memory, so only templates that the operator chose are rendered: the base model's, and those of adapters where
``--allow-adapter-templates`` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from loraplex.errors import InvalidModel, InvalidRequest

#: what a template's own code can raise
_TEMPLATE_ERRORS: Final = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)


class ChatTemplate:
    """A compiled template. ``special_tokens`` are variables such as ``bos_token``; ``owner`` names it in messages."""

    def __init__(self, source: str, special_tokens: dict[str, str], owner: str = "the model") -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidModel(f"{owner}'s chat template does not compile: {error}") from error
        except RecursionError:
            raise InvalidModel(f"{owner}'s chat template is nested too deeply") from None
        self.source = source
        self.special_tokens = special_tokens
        self._owner = owner

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) messages, generation prompt added.

        Raises InvalidRequest with the template's own words when it refuses the messages.
        """
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=True, **self.special_tokens
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"chat: {self._owner}'s chat template refuses it: {error}", field="chat") from error


def read_chat_template(model_dir: Path) -> ChatTemplate | None:
    """The template that ``model_dir`` ships (``chat_template.jinja`` or tokenizer_config.json), or None.

    Raises InvalidModel when it is there and cannot be used.
    """
    config = read_tokenizer_config(model_dir)
    jinja_file = model_dir / "chat_template.jinja"
    source = jinja_file.read_text(encoding="utf-8") if jinja_file.is_file() else template_of(config)
    if not source:
        return None
    return ChatTemplate(source, special_tokens_of(config))


def read_tokenizer_config(model_dir: Path) -> dict[str, object]:
    """The model's tokenizer_config.json, empty when it has none. Raises InvalidModel when it cannot be read."""
    file = model_dir / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidModel(f"{file} cannot be read: expected an object")
    return config


def template_of(config: Mapping[str, object]) -> str:
    """The template in a tokenizer_config.json: the only one, or the one called "default"; empty without one."""
    template = config.get("chat_template")
    if isinstance(template, list):
        found = [item.get("template") for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = found[0] if found else ""
    return template if isinstance(template, str) else ""


def special_tokens_of(config: Mapping[str, object]) -> dict[str, str]:
    """The ``*_token`` entries of a tokenizer_config.json, by name."""
    return {key: text for key, value in config.items() if (text := _token(key, value))}


def _token(key: str, value: object) -> str:
    """The text of a ``*_token`` entry: plain, or the ``content`` of an added token."""
    if not key.endswith("_token"):
        return ""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


def _to_json(value: object, indent: int | None = None) -> str:
    """Plain JSON: Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what training learns from; when serving, its body stands as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
