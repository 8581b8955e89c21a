"""Exports of adapters: what is asked, and how far a server has come. Pure: no channel, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loraplex_proto.v1 import adapters_pb2

_FORMATS: Final = {
    "peft": adapters_pb2.ExportAdapterRequest.PEFT,
    "merged": adapters_pb2.ExportAdapterRequest.MERGED,
}
#: the stage of the last progress
DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far an export has come. The last one's ``stage`` is "done". ``total_bytes``: 0 where it is not known yet.
    ``destination``: the path on the server's machine. Of a quantized export the last one says what was lost:
    ``largest_error`` and ``mean_error`` are relative Frobenius errors of its matrices; 0 where none was quantized."""

    stage: str
    done_bytes: int
    total_bytes: int
    destination: str
    largest_error: float = 0.0
    largest_error_site: str = ""
    mean_error: float = 0.0


def export_request(
    name: str, destination: str, format: str, max_shard_bytes: int, quantization: str
) -> adapters_pb2.ExportAdapterRequest:
    """The request that ``export_adapter`` sends. Raises ValueError: an unknown format."""
    if format not in _FORMATS:
        raise ValueError(f"format {format!r} is unknown; allowed are {', '.join(_FORMATS)}")
    return adapters_pb2.ExportAdapterRequest(
        name=name,
        destination=destination,
        format=_FORMATS[format],
        max_shard_bytes=max_shard_bytes,
        quantization=quantization,
    )


def export_progress(pb: adapters_pb2.ExportProgress) -> ExportProgress:
    """Read an ExportProgress."""
    return ExportProgress(
        pb.stage,
        pb.done_bytes,
        pb.total_bytes,
        pb.destination,
        pb.largest_error,
        pb.largest_error_site,
        pb.mean_error,
    )
