"""Which attention backend serves where, and what the others say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from loraplex_kernels.backend import choose_attention
from tests.ops.attention_subjects import CPU, CUDA, LARGE_PAGE, make_subject, no_varlen

pytest.importorskip("triton", reason="triton is not installed")


def test_the_interpreter_serves_a_cpu_when_asked() -> None:
    assert make_subject("triton, interpreted").backend.name == "triton"
    with pytest.raises(ValueError, match=r"'varlen' cannot run: it runs on CUDA tensors, the device is cpu; on cpu"):
        choose_attention("varlen", CPU)
    code = "import torch\nfrom loraplex_kernels.backend import choose_attention\n"
    code += "choose_attention('triton', torch.device('cpu'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert "'triton' cannot run: it compiles for CUDA, the device is cpu" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_the_gpu_backends_say_so() -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot run: torch finds no CUDA device"):
        choose_attention("triton", CUDA)
    with pytest.raises(ValueError, match=r"'varlen' cannot run: .* triton, and torch finds no CUDA device"):
        choose_attention("varlen", CUDA, page_size=LARGE_PAGE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu() -> None:
    assert choose_attention("auto", CUDA, dtype=torch.float32).name == "triton"
    large = choose_attention("auto", CUDA, page_size=LARGE_PAGE).name
    assert large == ("triton" if no_varlen() else "varlen")
