"""The text files of an export: tokenizer, chat template and generation settings, the adapter's over the base's.

File by file, as they are: an adapter's requests are tokenized by its own files where it ships them, and by the base's
where it does not (``adapters/text/own_text.py``), and so is what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.reading.source import AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.adapters.text.generation_defaults import GENERATION_FILE
from loraplex.adapters.text.own_text import TOKENIZER_FILE
from loraplex.adapters.text.token_settings import ADDED, CONFIG, SPECIAL_MAP, TEMPLATE
from loraplex.text.tokenizer import OLDER_FILES

MAX_TEXT_BYTES: Final = 64 << 20
TEXT_FILES: Final = (
    *(TOKENIZER_FILE, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE, GENERATION_FILE),
    *OLDER_FILES,
    "merges.txt",
)
_SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")

Files = Mapping[str, bytes]
"""Name -> content."""


def text_of(directory: AdapterDir) -> dict[str, bytes]:
    """The text files in a directory. Raises InvalidAdapter: one of them is too large, or no file."""
    return {name: read_small_file(directory, name, MAX_TEXT_BYTES) for name in TEXT_FILES if directory.has(name)}


def base_text_of(model_dir: Path) -> dict[str, bytes]:
    """Those of a base model. A GGUF file served as it is has none."""
    found = ((name, model_dir / name) for name in TEXT_FILES) if model_dir.is_dir() else ()
    return {name: path.read_bytes() for name, path in found if path.is_file()}


def laid_over_base(own: Files, base: Files, delta: AdapterDelta) -> dict[str, bytes]:
    """The files of a model that is the base with the adapter in it; ``delta`` says where its answers end."""
    files = {**base, **own}
    template = _template_in(base.get(CONFIG))
    if CONFIG in own and TEMPLATE not in files and template and not _template_in(own[CONFIG]):
        files[TEMPLATE] = template.encode()  # chats of an adapter without a template are rendered with the base's
    generation = _generation(own, base, delta)
    if generation:
        files[GENERATION_FILE] = json.dumps(generation, indent=2).encode() + b"\n"
    return files


def _template_in(config: bytes | None) -> str:
    found = {} if config is None else json.loads(config)
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else ""


def _generation(own: Files, base: Files, delta: AdapterDelta) -> dict[str, object]:
    """The adapter's settings where it ships some, and tokens of the base that it does not name; else the base's."""
    below = parse_object(base[GENERATION_FILE], GENERATION_FILE) if GENERATION_FILE in base else {}
    found = below
    if GENERATION_FILE in own:
        ids = {key: below[key] for key in _SPECIAL_IDS if below.get(key) is not None}
        shipped = parse_object(own[GENERATION_FILE], GENERATION_FILE)
        found = {**ids, **{key: value for key, value in shipped.items() if value is not None}}
    eos = None if delta.text is None else delta.text.facts.eos_token_ids
    return found if eos is None else {**found, "eos_token_id": list(eos)}
