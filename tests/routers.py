"""Routers for tests, written without the code that builds them; and what they choose, by formulas in plain numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

NORM = "model.layers.0.input_layernorm.weight"
Vectors = npt.NDArray[np.float64]


def write_router(path: Path, base: Path, prototypes: Mapping[str, torch.Tensor], **changes: object) -> Path:
    """A router among the names of ``prototypes``; ``changes`` are keys of its JSON, left out where they are None."""
    config = json.loads((base / "config.json").read_text())
    values: dict[str, object] = {
        "loraplex_router": 1,
        "feature": "centroid",
        "base": {"hidden_size": config["hidden_size"], "vocab_size": config["vocab_size"], "vocabulary": ""},
        "adapters": list(prototypes),
        "temperature": 0.1,
        "threshold": 0.0,
        "default": None,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "router.json").write_text(json.dumps(values | changes))
    tensors = {f"prototypes.{index}": each.contiguous() for index, each in enumerate(prototypes.values())}
    save_file(tensors, path / "router.safetensors")
    return path


def random_prototypes(base: Path, names: Sequence[str], count: int = 1) -> dict[str, torch.Tensor]:
    """``count`` random vectors for each name."""
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(len(names) * 100 + count)
    return {name: torch.randn(count, hidden, generator=generator) for name in names}


def token_vectors(base: Path, token_ids: Sequence[int], *, arrow: bool = False) -> Vectors:
    """The tokens' rows of the embedding, through the first layer's norm for ``arrow``; of length 1."""
    tensors = load_file(base / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"].double().numpy()[list(token_ids)]
    if arrow:
        rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-6) * tensors[NORM].double().numpy()
    unit: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def expected(
    base: Path, prototypes: Mapping[str, torch.Tensor], token_ids: Sequence[int], *, arrow: bool = False
) -> dict[str, float]:
    """Name -> probability, at temperature 0.1. ``arrow``: of one prototype each."""
    vectors = token_vectors(base, token_ids, arrow=arrow)
    scores = []
    for each in prototypes.values():
        unit = each.double().numpy() / np.linalg.norm(each.double().numpy(), axis=1, keepdims=True)
        cosines = vectors @ unit.T
        scores.append((np.abs(cosines) if arrow else cosines).mean(axis=0).max())
    powers = np.exp(np.array(scores) / 0.1)
    return dict(zip(prototypes, (powers / powers.sum()).tolist(), strict=True))
