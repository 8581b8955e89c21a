"""The dtype that everything of a run is computed in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from loraplex.config import ModelConfig
from loraplex.models.loader import plan_model
from loraplex.models.placement import DTYPES

_AUTO: Final = "auto"


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option ``--dtype``."""
    told = f"of the model and of all that is compared with it (default {_AUTO}: what a server takes on this machine)"
    parser.add_argument("--dtype", choices=(_AUTO, *DTYPES), default=_AUTO, help=told)


def served_dtype(model_dir: Path, asked: str) -> str:
    """The name of what is ``asked`` for; ``auto`` becomes what a server on a CPU takes for the model."""
    plan = plan_model(model_dir, ModelConfig(model=str(model_dir), device="cpu", dtype=asked))
    return str(plan.placement.dtype).removeprefix("torch.")
