"""The JSON that a load leaves behind: everything that plots and page are made of. Its schema is ``schema.json``.

``python -m bench.serve.document`` writes the schema anew, for when a field has changed. Times are seconds.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final, Literal

import msgspec

from bench.machine import Machine
from bench.serve.compare import Comparison
from bench.serve.measures import Latency, Summary
from bench.serve.workload import Side, Slo, Workload

SCHEMA: Final = 1
SCHEMA_FILE: Final = Path(__file__).with_name("schema.json")


class ServerFacts(msgspec.Struct, frozen=True):
    """What was loaded, as the server says it."""

    address: str
    #: whether client and server share a machine, and so its cores
    same_machine: bool
    version: str
    model: str
    architecture: str
    dtype: str
    device: str
    quantization: str
    tensor_parallel_size: int
    weight_bytes: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    backends: dict[str, str]


class AdapterFacts(msgspec.Struct, frozen=True):
    """One adapter of the workload."""

    name: str
    kind: str
    max_rank: int
    bytes: int
    uid: str


class RequestRecord(msgspec.Struct, frozen=True):
    """One request that was sent. Times are after the start of its run; ``due_s`` is None in a closed loop."""

    index: int
    adapter: str
    prompt_tokens: int
    output_tokens: int
    due_s: float | None
    sent_s: float
    first_token_s: float | None
    ended_s: float
    tokens: int
    #: a gRPC status by name, or UNFINISHED
    code: str
    good: bool | None


class Timeline(msgspec.Struct, frozen=True):
    """Output tokens that came in each bin of ``bin_s`` seconds from the start of the run, of all requests."""

    bin_s: float
    tokens: list[int]


class Run(msgspec.Struct, frozen=True):
    """One schedule, played once on one side."""

    side: Side
    repeat: int
    #: after the start of the first run
    started_s: float
    planned: int
    #: whether every request was sent and ended by itself, well or not
    complete: bool
    summary: Summary
    #: open loops only
    send_lag_s: Latency | None
    #: CPU time of the client over the run's duration, in cores
    client_cores: float
    timeline: Timeline
    requests: list[RequestRecord]

    @property
    def flawless(self) -> bool:
        """Whether every request completed, with all its tokens: only then is the speed one of the work asked for."""
        return self.complete and self.summary.completed == self.planned and not self.summary.short


class Distribution(msgspec.Struct, frozen=True):
    """Percentiles 0, 0.5, ... 100, in seconds; empty when there are no values."""

    ttft_s: list[float]
    tpot_s: list[float]
    itl_s: list[float]
    e2e_s: list[float]


class SideResult(msgspec.Struct, frozen=True):
    """All runs of one side together. ``adapters`` has "base" for requests without one."""

    all: Summary
    adapters: dict[str, Summary]
    distribution: Distribution


class Retention(msgspec.Struct, frozen=True):
    """Output tok/s with adapters over output tok/s without, for each repeat whose two runs completed every request."""

    ratios: list[float]
    median: float
    least: float
    most: float

    @staticmethod
    def of(runs: list[Run]) -> Retention | None:
        """None without a repeat that has both."""
        speed = {(run.side, run.repeat): run.summary.output_tokens_per_s for run in runs if run.flawless}
        repeats = sorted({repeat for _, repeat in speed})
        ratios = [
            speed["adapters", repeat] / speed["base", repeat]
            for repeat in repeats
            if ("adapters", repeat) in speed and speed.get(("base", repeat), 0.0) > 0
        ]
        return Retention(ratios, statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


class Document(msgspec.Struct, frozen=True):
    """One load. ``partial``: it was stopped before every request of every run had ended, ``stopped`` says why."""

    schema: int
    partial: bool
    stopped: Literal["", "interrupted", "time", "lost"]
    stop_message: str
    requests_planned: int
    requests_ended: int
    command: list[str]
    started_at: str
    finished_at: str
    #: the client's
    machine: Machine
    versions: dict[str, str]
    server: ServerFacts
    adapters: list[AdapterFacts]
    workload: Workload
    slo: Slo | None
    timeout_s: float
    definitions: dict[str, str]
    #: what a reader must know before believing the numbers
    warnings: list[str]
    sides: dict[str, SideResult]
    retention: Retention | None
    #: None when no metrics address was given
    comparison: Comparison | None
    runs: list[Run]


def schema_text() -> str:
    """The JSON Schema of ``Document``."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Document)), indent=1).decode() + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text())
