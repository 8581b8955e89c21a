"""Which tokens end a sequence, as the checkpoint says: generation_config.json first, then config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex.errors import InvalidModel
from loraplex.json_config import MAX_CONFIG_BYTES, read_json_object

_KEY: Final = "eos_token_id"


def eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """End-of-sequence token ids, empty when the checkpoint names none.

    Raises InvalidModel when the value is neither a token id nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        value = read_json_object(path, MAX_CONFIG_BYTES).get(_KEY)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise InvalidModel(f"{str(path)!r}: {_KEY} is {value!r}, expected a token id or a list of token ids")
        return tuple(ids)
    return ()
