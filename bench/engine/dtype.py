"""The dtype that everything of a run is computed in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from transformers import AutoConfig

from loraplex.config import ModelConfig
from loraplex.models.placement import DTYPES, resolve_placement

_AUTO: Final = "auto"


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option ``--dtype``."""
    told = f"of the model and of all that is compared with it (default {_AUTO}: what a server takes on this machine)"
    parser.add_argument("--dtype", choices=(_AUTO, *DTYPES), default=_AUTO, help=told)


def served_dtype(model_dir: Path, asked: str) -> str:
    """The name of what is ``asked`` for; ``auto`` becomes what a server on a CPU takes for the model."""
    config = AutoConfig.from_pretrained(model_dir).to_dict()
    dtype = resolve_placement(ModelConfig(model=str(model_dir), device="cpu", dtype=asked), config).dtype
    return next(name for name, known in DTYPES.items() if known == dtype)
