"""Rows of a site's matrix that an adapter has of its own: found by comparison with the base's, and laid over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidAdapter
from loraplex.layers.rows import Rows

#: rows compared at a time: bounds the memory that a comparison takes
_CHUNK_ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Whole:
    """A site's parameters as an adapter saved them: ``weight`` as the base's module has it (``Site.weight_shape``, with
    any number of rows at an end of the vocabulary), ``bias`` ``[n]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def fitted(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """``tensor`` in the base's ``dtype``. Raises InvalidAdapter naming ``what``: values leave its range."""
    rounded = tensor.to(dtype)
    if rounded.numel() and not bool(rounded.isfinite().all()):
        raise InvalidAdapter(f"{what}: values leave the range of the base's {dtype}")
    return rounded


def differing(own: Whole, base: Whole, what: str) -> Rows | None:
    """The rows of ``own`` that are not the base's, or that it has beyond them; None: there are none.

    Rows are equal where they differ by one rounding only, of either side to the other's dtype: both may have been
    rounded on their way here. All rows without indices when more than half of as many rows as the base has differ; of
    a vector and of a convolution, whose layers take them as one, when any does.

    Raises InvalidAdapter naming ``what``: values leave the range of the base's dtype.
    """
    dtype, weight = base.weight.dtype, own.weight
    if weight.dim() != 2:
        whole = Rows(fitted(_as_rows(weight), dtype, what), None, _fitted_bias(own.bias, dtype, what))
        return whole if changes(whole, base) else None
    changed = torch.ones(len(weight), dtype=torch.bool)
    for start in range(0, len(base.weight), _CHUNK_ROWS):
        rows = slice(start, min(start + _CHUNK_ROWS, len(base.weight)))
        changed[rows] = ~_equal(weight[rows], base.weight[rows]).all(1)
    if own.bias is not None and base.bias is not None:
        changed |= ~_equal(own.bias, base.bias)
    indices = changed.nonzero().flatten()
    if not len(indices):
        return None
    if len(weight) == len(base.weight) and 2 * len(indices) > len(weight):
        return Rows(fitted(weight, dtype, what), None, _fitted_bias(own.bias, dtype, what))
    bias = None if own.bias is None else own.bias[indices]
    return Rows(fitted(weight[indices], dtype, what), indices, _fitted_bias(bias, dtype, what))


def changes(rows: Rows, base: Whole) -> bool:
    """Whether ``rows`` are other than those of the base, up to one rounding."""
    if rows.indices is None:
        known, weight, bias = rows.values, _as_rows(base.weight), base.bias
        if len(known) != len(weight):
            return True
    else:
        if int(rows.indices[-1]) >= len(base.weight):
            return True
        known, weight = rows.values, base.weight[rows.indices]
        bias = None if base.bias is None else base.bias[rows.indices]
    if rows.bias is not None and (bias is None or not _same(rows.bias, bias)):
        return True
    return not _same(known, weight)


def overlaid(below: Rows | None, above: Rows) -> Rows:
    """``above`` over ``below``: where both have a row, that of ``above``, which names its rows. No biases."""
    assert above.indices is not None
    if below is None:
        return above
    if below.indices is None:
        values = below.values.clone()
        values[above.indices] = above.values
        return Rows(values)
    kept = ~torch.isin(below.indices, above.indices)
    indices, order = torch.cat((below.indices[kept], above.indices)).sort()
    return Rows(torch.cat((below.values[kept], above.values))[order], indices)


def atop(below: Rows, above: Rows, num_known: int) -> Rows:
    """A kind's own rows ``above`` over those under it, of a matrix whose base has ``num_known`` rows."""
    if above.indices is not None:
        return overlaid(below, above)
    if len(above.values) == num_known:
        return above
    return Rows(above.values, torch.arange(len(above.values)), above.bias)


def laid_over(weight: torch.Tensor, rows: Rows | None, num_rows: int) -> torch.Tensor:
    """The base's ``weight`` ``[n, in]`` with ``rows`` in it, ``[num_rows, in]``: a new tensor where that differs."""
    if rows is None and num_rows == len(weight):
        return weight
    wide = weight.new_zeros(num_rows, weight.shape[1])
    wide[: len(weight)] = weight
    if rows is not None:
        wide[slice(None) if rows.indices is None else rows.indices] = rows.values
    return wide


def whole_rows(base: Whole, bias: torch.Tensor) -> Rows:
    """All of the base's rows, in its dtype, with another bias ``[n]``."""
    return Rows(_as_rows(base.weight).clone(), None, bias)


def _as_rows(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's ``[channels, 1, width]`` as ``[channels, width]``; any other as it is."""
    return weight.flatten(1) if weight.dim() == 3 else weight


def _fitted_bias(bias: torch.Tensor | None, dtype: torch.dtype, what: str) -> torch.Tensor | None:
    return None if bias is None else fitted(bias, dtype, what)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(_equal(one, other).all())


def _equal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Elementwise, up to one rounding of either side to the other's dtype."""
    return (one.to(other.dtype) == other) | (one == other.to(one.dtype))
