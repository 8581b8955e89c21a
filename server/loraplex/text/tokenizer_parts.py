"""A tokenizer.json in two parts: its model (vocabulary and merges, megabytes) and the rest (a few kilobytes).

Fine-tuned copies of a tokenizer differ in the rest: added tokens, special tokens, templates. Built on the model that
the base's tokenizer already holds, one costs microseconds and kilobytes; read whole, up to a second and 100 MB.
Does not know adapters or requests.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import Model

from loraplex.errors import LoraplexError

#: where the model begins in a file that the library wrote; in a string, a line could not end before it
_MODEL_BEGINS: Final = b'\n  "model": {'
_NO_MODEL: Final = b'\n  "model": null}'
_EMPTY_MODEL: Final = {"type": "BPE", "vocab": {}, "merges": []}


def split_document(raw: bytes) -> tuple[bytes, bytes] | None:
    """(the file with its model left out, the part left out), or None when the library did not write it.

    The first is JSON exactly if the file is, given that the second is the end of another such file: the model was found
    by its indentation, and a caller checks that it stands at the top.
    """
    at = raw.find(_MODEL_BEGINS)
    return None if at < 0 else (raw[:at] + _NO_MODEL, raw[at:])


def on_model(document: bytes, model: Model) -> Backend:
    """The tokenizer of a document without model, on a model that another tokenizer holds too.

    Raises ValueError when an added token does not get the id that the document gives it.
    """
    head = json.loads(document)
    bare = {**head, "truncation": None, "padding": None, "added_tokens": [], "model": _EMPTY_MODEL}
    backend = Backend.from_str(json.dumps(bare))
    backend.model = model
    added: list[dict[str, Any]] = sorted(head["added_tokens"], key=lambda token: int(token["id"]))
    backend.add_tokens([AddedToken(**{key: token[key] for key in token if key != "id"}) for token in added])
    for token in added:
        got = backend.token_to_id(token["content"])
        if got != token["id"]:
            raise ValueError(f"added token {token['content']!r} has id {token['id']}, and this vocabulary gives {got}")
    return backend


@contextlib.contextmanager
def tokenizer_errors(make: Callable[[str], LoraplexError]) -> Iterator[None]:
    """Whatever the Rust side raises in the block, panics too, becomes ``make(reason)``. For threads, not for tasks."""
    try:
        yield
    except LoraplexError:
        raise
    except BaseException as error:  # a panic is no Exception
        reason = " ".join(str(error).split())
        raise make(reason[:300] or type(error).__name__) from None
