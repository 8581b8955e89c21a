"""The tape that stands in for captured graphs (``tests/fakes_graphs.py``) refuses and replays as they do."""

from __future__ import annotations

import pytest
import torch

from tests.fakes_graphs import TapeCapture


def test_the_tape_refuses_what_a_graph_cannot_hold() -> None:
    """Otherwise tests on it would prove less than they say."""
    x = torch.ones(3)
    for step in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1.0]), lambda: torch.equal(x, x)):
        with pytest.raises(RuntimeError, match="while capturing"):
            TapeCapture().capture(step)


def test_the_tape_runs_no_python() -> None:
    x, y, calls = torch.zeros(3), torch.zeros(3), []
    replay = TapeCapture().capture(lambda: (calls.append(1), y.copy_(x * 2 + len(calls)))[0])
    x.fill_(5)
    replay()
    assert y.tolist() == [12.0] * 3  # 2 calls at capture, and 2 it stays
    assert len(calls) == 2
