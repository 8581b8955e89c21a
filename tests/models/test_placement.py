"""Where a model goes: what the flags say, what the machine has."""

from __future__ import annotations

import pytest
import torch

from loraplex.errors import InvalidConfig
from loraplex.models.placement import resolve_device


def test_cuda_without_a_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidConfig, match=r"^device 'cuda', but this machine or this torch has no CUDA device$"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"^device 'tpu'; allowed are auto, cpu, cuda$"):
        resolve_device("tpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_its_index(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tensors say cuda:0, and 'cuda' alone is not equal to that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert resolve_device(name) == torch.device("cuda", 0)
    assert resolve_device("cpu") == torch.device("cpu")
