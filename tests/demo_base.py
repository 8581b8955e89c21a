"""The demo's base model for tests that need weights somebody trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.config import default_cache_dir
from loraplex.demo.base import ensure_demo_base
from loraplex.errors import NotFound


def demo_base() -> Path:
    """Its checkpoint, converted once and kept between runs; skips the test where the package is not installed."""
    try:
        return ensure_demo_base(default_cache_dir(), None)
    except NotFound as error:
        pytest.skip(f"the demo base is missing: {error}")
