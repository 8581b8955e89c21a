"""How long a merge takes whoever asks for it: of four adapters, by each method, on a server that is idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench.engine.record import Measure
from bench.engine.through_grpc import bench_server
from bench.merging.methods import WEIGHTS
from loraplex.types import MergeOptions
from loraplex_client import Client
from loraplex_client import MergeOptions as Asked

#: seconds that a merge is to take
MOST_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class MergesPlan:
    """``merges`` by name, each of all ``adapters``, once in each of ``rounds``. ``of``: what these are, for people."""

    model_dir: Path
    dtype: str
    adapters: dict[str, Path]
    merges: Mapping[str, MergeOptions]
    rounds: int
    of: str = ""

    @property
    def num_turns(self) -> int:
        return 1 + len(self.merges) * self.rounds


def merges(plan: MergesPlan, folder: Path, on_turn: Callable[[str], None]) -> Iterator[Measure]:
    """Serve, and merge. ``on_turn`` is told of each merge before it begins; the first, which is not kept, is a
    warm-up."""
    names = list(plan.merges)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with (
        bench_server(plan.model_dir, plan.adapters, folder / f"merges{plan.of}.log", dtype=plan.dtype) as server,
        Client(server.address) as client,
    ):
        on_turn("warm-up")
        _merge(client, plan, 0, MergeOptions("cat"))
        for turn in range(plan.rounds):
            for name in names[::-1] if turn % 2 else names:
                on_turn(f"merge {name}")
                start = time.perf_counter()
                _merge(client, plan, turn, plan.merges[name])
                seconds[name].append(time.perf_counter() - start)
    for name, took in seconds.items():
        yield Measure(f"merge {name}{plan.of}", statistics.median(took), "s", MOST_S, _detail(took))


def _merge(client: Client, plan: MergesPlan, turn: int, options: MergeOptions) -> None:
    # weights change places from turn to turn: what is merged again as it was need not be tried out again
    inputs = {name: WEIGHTS[(place + turn) % len(WEIGHTS)] for place, name in enumerate(plan.adapters)}
    client.merge_adapters("merged", inputs, Asked(**msgspec.structs.asdict(options)), replace=True)


def _detail(took: list[float]) -> str:
    return f"{min(took):.2f} - {max(took):.2f}"
