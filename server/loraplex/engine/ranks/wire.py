"""Tensors and lowered adapters as they cross to other ranks: dtype, shape and bytes, nothing that could run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
import torch

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.layers.rows import Rows

#: adapters and bases have no others
_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    }
)


class TensorWire(msgspec.Struct, frozen=True, array_like=True):
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorWire:
        """``tensor``, wherever it is, by value."""
        host = tensor.detach().cpu().contiguous()
        name = str(host.dtype).removeprefix("torch.")
        assert name in _DTYPES, f"a tensor of {name} on its way to another rank"
        return TensorWire(name, tuple(host.shape), host.flatten().view(torch.uint8).numpy().tobytes())

    def tensor(self) -> torch.Tensor:
        """A tensor of its own, on the host. Raises ValueError, KeyError: no tensor was sent so."""
        dtype = _DTYPES[self.dtype]
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


class DeltaWire(msgspec.Struct, frozen=True, omit_defaults=True):
    """One site of one rank's part of an adapter. What refuses sums of it stays with the first rank."""

    site: str
    a: TensorWire | None = None
    b: TensorWire | None = None
    scale: float = 1.0
    out_scale: TensorWire | None = None
    in_scale: TensorWire | None = None
    shift: TensorWire | None = None
    rows: TensorWire | None = None
    row_indices: TensorWire | None = None
    row_bias: TensorWire | None = None

    @staticmethod
    def of(site: str, delta: SiteDelta) -> DeltaWire:
        """``delta`` at ``site``."""
        pair, rows = delta.low_rank, delta.rows
        return DeltaWire(
            site,
            a=None if pair is None else TensorWire.of(pair.a),
            b=None if pair is None else TensorWire.of(pair.b),
            scale=1.0 if pair is None else pair.scale,
            out_scale=_sent(delta.out_scale),
            in_scale=_sent(delta.in_scale),
            shift=_sent(delta.shift),
            rows=None if rows is None else TensorWire.of(rows.values),
            row_indices=None if rows is None else _sent(rows.indices),
            row_bias=None if rows is None else _sent(rows.bias),
        )

    def delta(self) -> SiteDelta:
        """What was sent."""
        pair = None
        if self.a is not None and self.b is not None:
            pair = LowRank(self.a.tensor(), self.b.tensor(), self.scale)
        rows = None
        if self.rows is not None:
            rows = Rows(self.rows.tensor(), _received(self.row_indices), _received(self.row_bias))
        return SiteDelta(pair, _received(self.out_scale), _received(self.in_scale), _received(self.shift), rows)


def _sent(tensor: torch.Tensor | None) -> TensorWire | None:
    return None if tensor is None else TensorWire.of(tensor)


def _received(wire: TensorWire | None) -> torch.Tensor | None:
    return None if wire is None else wire.tensor()
