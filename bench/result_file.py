"""A measurement's JSON: what it says of itself, and that it is written whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.machine import shown_command


def write_result(path: Path, schema: int, command: Sequence[str], found: Mapping[str, object]) -> None:
    """``found`` behind the schema's number, the command without anybody's folders, and the time."""
    document = {
        "schema": schema,
        "command": shown_command(command),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)
