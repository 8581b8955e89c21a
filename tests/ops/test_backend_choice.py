"""Backends are chosen by name, and a name that cannot run is an error that says what can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from loraplex_kernels.backend import choose_attention, choose_conv, choose_lora, choose_ssd

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)  # a name only; nothing is put there


def test_auto_takes_the_fastest_and_says_which() -> None:
    assert choose_lora("auto", CPU).name == "cpu"
    assert choose_attention("auto", CPU).name == "cpu"
    assert choose_conv("auto", CPU).name == "cpu"
    assert choose_ssd("auto", CPU).name == "cpu"
    assert choose_lora("reference", CPU).name == "reference"
    assert choose_attention("reference", CPU).name == "reference"


def test_unknown_and_unfit_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"lora backend 'fast' cannot run: there is no such backend; .* cpu, .*reference"
    ):
        choose_lora("fast", CPU)
    with pytest.raises(
        ValueError, match=r"attention backend 'cpu' cannot run: .* cuda:0; on cuda:0 these can: auto, ref"
    ):
        choose_attention("cpu", CUDA)


def test_a_server_on_a_cpu_does_without_triton() -> None:
    program = """
import sys, torch
from loraplex_kernels.backend import choose_attention, choose_conv, choose_lora, choose_ssd
for choose in (choose_lora, choose_attention, choose_conv, choose_ssd):
    assert choose("auto", torch.device("cpu")).name == "cpu"
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], env=_environment(), check=True, timeout=120)


def test_kernels_for_a_gpu_say_what_they_need() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    program = """
import torch
from loraplex_kernels.backend import choose_lora
for name in ("triton", "triton-fused"):
    try:
        choose_lora(name, torch.device("cpu"))
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120, check=True)
    for name in ("triton", "triton-fused"):
        assert f"lora backend '{name}' cannot run: it runs on cuda, and on cpu only in Triton's inter" in done.stdout
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match=rf"'{name}' cannot run: Triton is in interpreter mode"):
                choose_lora(name, CUDA)
    if not torch.cuda.is_available():
        for choose in (choose_conv, choose_ssd):
            assert choose("triton", CPU).name == "triton"
            with pytest.raises(ValueError, match="'triton' cannot run: Triton is in interpreter mode"):
                choose("triton", CUDA)


def _environment() -> dict[str, str]:
    """Ours, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
