"""What a configuration leaves to the device."""

from __future__ import annotations

import pytest
import torch

from loraplex.config import EngineConfig
from loraplex.engine.defaults import kv_bytes, with_step_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "num_seqs", "expected"), [(CPU, 64, 256), (CUDA, 64, 2048), (CPU, 400, 400), (CUDA, 3000, 3000)]
)
def test_a_step_suits_the_device_and_every_decode_fits(device: torch.device, num_seqs: int, expected: int) -> None:
    assert with_step_size(EngineConfig(max_num_seqs=num_seqs), device).max_num_batched_tokens == expected


def test_a_step_size_that_was_asked_for_stays() -> None:
    asked = EngineConfig(max_num_batched_tokens=7)
    assert with_step_size(asked, CUDA) is asked


def test_the_cache_takes_a_share_of_what_a_gpu_has_left_and_a_fixed_size_elsewhere() -> None:
    assert kv_bytes(EngineConfig(), CUDA, 100 << 30) == 85 << 30
    assert kv_bytes(EngineConfig(), CUDA, -5) == 0
    assert kv_bytes(EngineConfig(), CPU, 0) == 1 << 30
    assert kv_bytes(EngineConfig(kv_cache_memory=123), CUDA, 100 << 30) == 123
