"""Triton's interpreter as tests use it: without what it computes and nobody reads."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec


def without_unread_checks() -> None:
    """Kernels that this process interprets look for no overflow of integers.

    Each sum and product of integers is made again in 64 bits and compared, for an assertion that is only there under
    ``TRITON_DEBUG``: a fifth of the interpreter's time. To be called when ``TRITON_INTERPRET`` is set as it stays.
    """
    if find_spec("triton") is None:
        return
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
