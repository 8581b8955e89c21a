"""The vectors that our CPU kernels and their layouts are made for: 64 bytes, 16 floats."""

from __future__ import annotations

from typing import Final

#: float32 numbers of a vector
LANES: Final = 16
VECTOR_BYTES: Final = 64
