"""Fixtures of the engine's tests: a base and six adapters. A file that needs others has its own by these names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.engine.local import LocalEngine
from tests.engines import make_adapters
from tests.merged_forms import serve
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a head of its own, in a directory that adapters may come from."""
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("engine"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """Six adapters of it, by name."""
    return make_adapters(base, base.parent / "adapters")


@pytest.fixture
def engine(base: Path, adapters: dict[str, Path]) -> LocalEngine:
    """An engine that has loaded them."""
    return serve(base, adapters)
