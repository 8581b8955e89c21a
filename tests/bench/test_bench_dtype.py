"""The dtype of a benchmark is the one that a server takes, or the one that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.engine.dtype import served_dtype
from loraplex.models import placement
from tests.servers import tiny_base


@pytest.mark.parametrize(("multiplies", "taken"), [(True, "bfloat16"), (False, "float32")])
def test_by_itself_it_is_what_a_server_takes(
    multiplies: bool, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "cpu_multiplies_bfloat16", lambda: multiplies)
    path = tiny_base(tmp_path)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    assert served_dtype(path, "auto") == taken
    assert served_dtype(path, "float16") == "float16"
