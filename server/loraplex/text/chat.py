"""Chat templates: the model's own Jinja template, rendered in a sandbox as transformers renders it. Knows no tokens.

The names a template may use (``raise_exception``, ``strftime_now``, ``tojson``, ``{% generation %}``, loop controls)
are those of transformers' ``chat_template_utils``. The sandbox keeps a template from reaching Python; it does not bound
time or memory, so only the base model's template, which the operator chose, is ever rendered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from loraplex.errors import InvalidModel, InvalidRequest


class ChatTemplate:
    """A compiled template. ``special_tokens`` are variables such as ``bos_token``."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidModel(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) messages, generation prompt added.

        Raises InvalidRequest with the template's own words when it refuses the messages.
        """
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # what a template's own code can raise
            raise InvalidRequest(f"chat: the model's chat template refuses it: {error}", field="chat") from error


def read_chat_template(model_dir: Path) -> ChatTemplate | None:
    """The template that ``model_dir`` ships (``chat_template.jinja`` or tokenizer_config.json), or None.

    Raises InvalidModel when it is there and cannot be used.
    """
    config_file = model_dir / "tokenizer_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{config_file} cannot be read: {error}") from error
    jinja_file = model_dir / "chat_template.jinja"
    source = jinja_file.read_text(encoding="utf-8") if jinja_file.is_file() else _of_config(config)
    if not source:
        return None
    return ChatTemplate(source, {key: text for key, value in config.items() if (text := _token(key, value))})


def _of_config(config: dict[str, object]) -> str:
    """One template, or the one called "default" among several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else ""


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
