"""What ``bench.merging`` counts as a peak: every block while it is there, whoever has it, and none that is not."""

from __future__ import annotations

import gc

import numpy as np
import torch

from bench.merging.peak import heap_set_aside, peak_of

MB = 1 << 20


def megabytes(count: int) -> torch.Tensor:
    return torch.ones(count * MB, dtype=torch.uint8)


def test_what_is_free_again_does_not_add_up() -> None:
    def work() -> None:
        for _ in range(5):
            megabytes(3)

    _, peak = peak_of(work)
    assert peak.total // MB == 3


def test_what_is_there_before_does_not_count_and_what_is_left_does() -> None:
    before = megabytes(50)
    left, peak = peak_of(lambda: before[: 2 * MB] + 1)
    assert left.nbytes == 2 * MB
    assert peak.tensors // MB == 2


def test_what_an_operation_takes_for_itself_counts() -> None:
    matrix = torch.rand(300, 300)
    values, peak = peak_of(lambda: torch.linalg.svdvals(matrix))
    assert peak.tensors > matrix.nbytes  # it decomposes a copy
    assert peak.tensors > 10 * values.nbytes


def test_arrays_and_bytes_count_beside_tensors() -> None:
    def work() -> None:
        held = megabytes(3)
        array = np.ones(2 * MB, dtype=np.uint8)
        text = bytes(4 * MB)
        del held, array, text

    _, peak = peak_of(work)
    assert peak.tensors // MB == 3
    assert peak.others // MB == 6
    assert peak.total // MB == 9


def test_what_is_left_of_arrays_is_the_result() -> None:
    array, peak = peak_of(lambda: np.ones(2 * MB, dtype=np.uint8))
    assert len(array) == 2 * MB
    assert peak.others < MB


def test_objects_that_were_set_aside_before_stay_so() -> None:
    """As those of all tests are (conftest.py)."""
    before = gc.get_freeze_count()
    assert before
    with heap_set_aside():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() >= before
    gc.unfreeze()
    try:
        with heap_set_aside():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()
