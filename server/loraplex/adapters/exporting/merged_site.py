"""One site of the base with an adapter folded in, for every sort of site: the algebra's formula, some rows at a time.

The result is rounded once, to the dtype that the base is served in. Beside it no more than a piece of the matrix is
there in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.saved.own_rows import fitted
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind

#: elements of a matrix that are float32 at once
_CHUNK_ELEMENTS: Final = 1 << 24

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A weight of the site's ``weight_shape``, and a bias ``[out]``."""


def merged_site(
    site: Site, delta: SiteDelta, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Pair:
    """``site`` of a model that computes what the base with ``delta`` does, rounded once, to ``dtype``.

    ``weight`` and ``bias`` are the base's own, of a quantized one perhaps more exact than ``dtype``. Rows of added
    tokens lie behind them.

    Raises:
        InvalidAdapter: the result leaves the range of the dtype.
    """
    match site.kind:
        case SiteKind.LINEAR:
            return _merged_linear(site, delta, weight, bias, dtype)
        case SiteKind.EMBEDDING:
            return _merged_embedding(site, delta, weight, dtype).to(dtype), None
        case SiteKind.NORM | SiteKind.VECTOR | SiteKind.CONV:
            rows = delta.rows
            assert rows is not None, f"{site.name} has nothing but rows of its own"
            shape = weight.shape if site.kind is SiteKind.CONV else rows.values.shape
            return rows.values.reshape(shape).to(dtype), rows.bias


def _merged_linear(
    site: Site, delta: SiteDelta, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Pair:
    known, total = len(weight), _num_rows(delta.rows, len(weight))
    merged = weight.new_empty(total, weight.shape[1], dtype=dtype)
    biases: list[torch.Tensor] = []
    step = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, known, step):
        stop = min(start + step, known)
        end = total if stop == known else stop
        part, part_bias = _between(delta, start, stop, end).merged(
            weight[start:stop], None if bias is None else bias[start:stop]
        )
        merged[start:end] = fitted(part, dtype, _named(site))
        if part_bias is not None:
            biases.append(fitted(part_bias, dtype, f"{_named(site)}, its bias"))
    return merged, torch.cat(biases) if biases else None


def _between(delta: SiteDelta, start: int, stop: int, end: int) -> SiteDelta:
    """What of ``delta`` concerns the outputs from ``start`` to ``stop``, and own rows up to ``end``."""
    low_rank = delta.low_rank
    return replace(
        delta,
        low_rank=None if low_rank is None else LowRank(low_rank.a, low_rank.b[start:stop], low_rank.scale),
        out_scale=None if delta.out_scale is None else delta.out_scale[start:stop],
        shift=None if delta.shift is None else delta.shift[start:stop],
        rows=_rows_between(delta.rows, start, end),
    )


def _rows_between(rows: Rows | None, start: int, end: int) -> Rows | None:
    if rows is None:
        return None
    if rows.indices is None:
        return Rows(rows.values[start:end], None, None if rows.bias is None else rows.bias[start:end])
    inside = (rows.indices >= start) & (rows.indices < end)
    if not bool(inside.any()):
        return None
    bias = None if rows.bias is None else rows.bias[inside]
    return Rows(rows.values[inside], rows.indices[inside] - start, bias)


def _merged_embedding(site: Site, delta: SiteDelta, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[tokens, hidden]``, in the dtype of ``weight``. What is done to added tokens is in their rows."""
    known, total = len(weight), _num_rows(delta.rows, len(weight))
    merged = weight.new_zeros(total, weight.shape[1])  # a token between added ones may have no row
    merged[:known] = weight
    if delta.rows is not None:
        merged[slice(None) if delta.rows.indices is None else delta.rows.indices] = delta.rows.values.to(weight.dtype)
    low_rank = delta.low_rank
    if low_rank is None and delta.out_scale is None and delta.shift is None:
        return merged
    step = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, known, step):
        tokens = slice(start, min(start + step, known))
        part = merged[tokens].float()
        if low_rank is not None:
            part += low_rank.scale * (low_rank.a[:, tokens].T.float() @ low_rank.b.T.float())
        if delta.out_scale is not None:
            part *= delta.out_scale
        if delta.shift is not None:
            part += delta.shift
        merged[tokens] = fitted(part, dtype, _named(site))
    return merged


def _num_rows(rows: Rows | None, known: int) -> int:
    if rows is None:
        return known
    return len(rows.values) if rows.indices is None else max(known, int(rows.indices[-1]) + 1)


def _named(site: Site) -> str:
    return f"{site.name!r} with the adapter folded in"
