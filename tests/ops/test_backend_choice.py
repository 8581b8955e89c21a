"""Backends are chosen by name, and a name that cannot run is an error that says what can."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.backend import choose_attention, choose_lora

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)  # a name only; nothing is put there


def test_auto_takes_the_fastest_and_says_which() -> None:
    assert choose_lora("auto", CPU).name == "cpu"
    assert choose_attention("auto", CPU).name == "cpu"
    assert choose_lora("reference", CPU).name == "reference"
    assert choose_attention("reference", CPU).name == "reference"


def test_unknown_and_unfit_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"lora backend 'fast' cannot run: there is no such backend; .* cpu, reference"
    ):
        choose_lora("fast", CPU)
    with pytest.raises(
        ValueError, match=r"attention backend 'cpu' cannot run: .* cuda:0; on cuda:0 these can: auto, ref"
    ):
        choose_attention("cpu", CUDA)
