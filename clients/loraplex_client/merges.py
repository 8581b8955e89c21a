"""What a server tells of a merged adapter: inputs, options and errors. Pure: no channel, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_proto.v1 import adapters_pb2


@dataclass(frozen=True, slots=True)
class MergeInput:
    """An adapter that was merged: its name and content then, and its weight."""

    name: str
    uid: str
    weight: float


@dataclass(frozen=True, slots=True)
class Merge:
    """What an adapter was merged from, and how: the fields of ``MergeOptions`` of these names, 0 where not given.

    ``largest_error``, ``mean_error``: relative Frobenius error of the sites whose sum was compressed; 0 where none was.
    """

    inputs: tuple[MergeInput, ...]
    method: str
    density: float
    majority_sign_method: str
    svd_rank: int
    svd_clamp: float
    max_error: float
    seed: int
    largest_error: float
    mean_error: float


def merge(pb: adapters_pb2.Merge) -> Merge:
    """Read a Merge."""
    return Merge(
        inputs=tuple(MergeInput(each.name, each.uid, each.weight) for each in pb.inputs),
        method=pb.method,
        density=pb.density,
        majority_sign_method=pb.majority_sign_method,
        svd_rank=pb.svd_rank,
        svd_clamp=pb.svd_clamp,
        max_error=pb.max_error,
        seed=pb.seed,
        largest_error=pb.largest_error,
        mean_error=pb.mean_error,
    )
