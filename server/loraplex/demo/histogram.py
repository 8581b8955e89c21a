"""A Prometheus histogram read from the text of /metrics: what the demo's proof rests on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

_BUCKET: Final = re.compile(r'^(?P<name>\w+)_bucket\{(?:.*,)?le="(?P<bound>[^"]+)".*\} (?P<count>\S+)', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts by upper bound, rising; the last bound is infinite. Labels other than ``le`` are summed."""

    counts: dict[float, float]

    @staticmethod
    def parse(text: str, name: str) -> Histogram:
        """The histogram ``name`` in an exposition; all zero (one infinite bound) when it is not there."""
        counts: dict[float, float] = {math.inf: 0.0}
        for match in _BUCKET.finditer(text):
            if match["name"] == name:
                bound = float(match["bound"])
                counts[bound] = counts.get(bound, 0.0) + float(match["count"])
        return Histogram(dict(sorted(counts.items())))

    def since(self, earlier: Histogram) -> Histogram:
        """What was observed after ``earlier`` was taken."""
        return Histogram({bound: count - earlier.counts.get(bound, 0.0) for bound, count in self.counts.items()})

    def rows(self) -> list[tuple[float, float, int]]:
        """(above, up to, observations) of every bucket that holds any."""
        rows, below, below_bound = [], 0.0, -math.inf
        for bound, count in self.counts.items():
            if count > below:
                rows.append((below_bound, bound, round(count - below)))
            below, below_bound = count, bound
        return rows

    def at(self, value: int) -> int:
        """Observations of exactly ``value``, the greatest that can occur; 0 when its bucket also takes smaller ones."""
        return sum(count for above, bound, count in self.rows() if value - 1 <= above < value <= bound)


def bucket_label(above: float, bound: float) -> str:
    """Whole numbers in (above, bound]: "5", "2-3", "33 or more"."""
    first = 0 if above == -math.inf else math.floor(above) + 1
    if bound == math.inf:
        return f"{first} or more"
    return str(first) if first == math.floor(bound) else f"{first}-{math.floor(bound)}"
