"""How tensors are cut over a group of ranks: pure arithmetic on sizes, no tensor in sight."""

from __future__ import annotations

import enum

from loraplex.errors import UnsupportedFeature
from loraplex.parallel.group import TPGroup


class Shard(enum.Enum):
    """How a linear layer is cut: not at all, by its output rows, or by its input columns."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"


def even_slice(size: int, group: TPGroup, what: str) -> slice:
    """This rank's share of ``size`` equal pieces.

    Raises UnsupportedFeature naming ``what`` when the group's size does not divide it.
    """
    if size % group.size:
        raise UnsupportedFeature(
            f"tensor parallel size {group.size} does not divide {what} = {size}", field="tensor_parallel_size"
        )
    share = size // group.size
    return slice(group.rank * share, (group.rank + 1) * share)


def kv_head_slice(kv_heads: int, group: TPGroup) -> slice:
    """This rank's key/value heads; when ranks outnumber heads, each head lives on ``size / kv_heads`` ranks.

    Raises UnsupportedFeature when neither number divides the other.
    """
    if group.size <= kv_heads or group.size % kv_heads:
        return even_slice(kv_heads, group, "num_key_value_heads")
    head = group.rank * kv_heads // group.size
    return slice(head, head + 1)


def scaled(heads: slice, width: int) -> slice:
    """The features that a run of heads covers, ``width`` each."""
    return slice(heads.start * width, heads.stop * width)


def length(part: slice) -> int:
    """How many rows or columns a slice with both ends set holds."""
    return int(part.stop) - int(part.start)
