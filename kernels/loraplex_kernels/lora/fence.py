"""The fence of backends whose writes are over when they return."""

from __future__ import annotations


class AlwaysDone:
    """Nothing is ever under way."""

    def done(self) -> bool:
        return True
