"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.ssd import SsdBackend
from tests.ops import attention_subjects, state_subjects
from tests.ops.lora_subjects import Subject, every_subject, make_subject


@pytest.fixture(params=every_subject())
def subject(request: pytest.FixtureRequest) -> Subject:
    """A lora backend on its device; every one, where a test does not say which."""
    return make_subject(request.param)


@pytest.fixture(params=attention_subjects.every_subject())
def attention(request: pytest.FixtureRequest) -> attention_subjects.Subject:
    """An attention backend on its device; every one, where a test does not say which."""
    return attention_subjects.make_subject(request.param)


@pytest.fixture(params=state_subjects.every_subject(state_subjects.CONV_SUBJECTS))
def conv(request: pytest.FixtureRequest) -> state_subjects.Subject[ConvBackend]:
    """A backend of causal convolutions on its device; every one, where a test does not say which."""
    return state_subjects.make_subject(state_subjects.CONV_SUBJECTS, request.param)


@pytest.fixture(params=state_subjects.every_subject(state_subjects.SSD_SUBJECTS))
def ssd(request: pytest.FixtureRequest) -> state_subjects.Subject[SsdBackend]:
    """A backend of state-space scans on its device; every one, where a test does not say which."""
    return state_subjects.make_subject(state_subjects.SSD_SUBJECTS, request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
