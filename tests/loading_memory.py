"""One rank of a checkpoint, loaded in a process of its own, which prints what its memory does meanwhile, as JSON:
``python -m tests.loading_memory DIR SMALL QUANTIZATION RANK SIZE``. ``SMALL``, a checkpoint of the same kind, is loaded
before: what a process keeps of its first load, a compiler and compiled kernels, is no part of a model."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplex.config import ModelConfig
from loraplex.models.loader import plan_model
from tests.held import held_bytes
from tests.lonely_rank import load_part

#: between two looks, seconds
_LOOK_S = 0.0005


@dataclass(frozen=True, slots=True)
class LoadingMemory:
    """Bytes. ``peak`` and ``after`` are more than before the load, ``held`` are those of the model's tensors."""

    peak: int
    after: int
    held: int


class Watch:
    """The largest memory of this process that no file backs, while the block lasts."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory that is nobody's file: pages of a mapped checkpoint are the kernel's to drop, and not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].removesuffix("kB")) << 10 for name in ("RssAnon", "RssShmem"))


def main(path: str, small: str, quantization: str, rank: str, size: str) -> None:
    """Load, watched."""
    first, plan = (plan_model(Path(one), ModelConfig(device="cpu", quantization=quantization)) for one in (small, path))
    load_part(first, int(rank), int(size))
    before = anonymous_bytes()
    with Watch() as watch:
        model = load_part(plan, int(rank), int(size))
    after = anonymous_bytes()
    print(json.dumps(asdict(LoadingMemory(max(watch.peak, after) - before, after - before, held_bytes(model)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
