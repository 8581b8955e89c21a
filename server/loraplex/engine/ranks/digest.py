"""What all ranks of a group must have alike, in one digest: the code they run, the base model's files, the settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec
import torch

from loraplex import __version__
from loraplex.config import Config

#: of a checkpoint's files, what is read; their sizes are in the digest as well
_HEAD_BYTES: Final = 1 << 16
_SUFFIXES: Final = (".json", ".safetensors", ".gguf")


def group_digest(config: Config, model_path: Path) -> str:
    """Hex digits that differ where ranks would compute different things."""
    digest = hashlib.sha256(f"loraplex {__version__}, torch {torch.__version__}".encode())
    digest.update(msgspec.json.encode((msgspec.structs.replace(config.model, model=""), config.engine)))
    files = sorted(model_path.iterdir()) if model_path.is_dir() else [model_path]
    for file in files:
        if file.suffix in _SUFFIXES and file.is_file():
            with file.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
            digest.update(f"{file.name} {file.stat().st_size} {hashlib.sha256(head).hexdigest()}".encode())
    return digest.hexdigest()[:32]
