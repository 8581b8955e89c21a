"""What every backend checks before it lays out an adapter's share of a table; knows no layout."""

from __future__ import annotations

import torch

from loraplex_kernels.lora import Factors, PartDelta, SlotDelta


def fit_delta(delta: SlotDelta, *, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype) -> SlotDelta:
    """The delta with factors in the table's dtype and vectors in float32, or ValueError naming part and shapes.

    Non-finite values are refused here, after rounding, because no backend could keep them from other rows cheaply:
    inside a product over several adapters' rows, ``0 * NaN`` is NaN.
    """
    if len(delta.parts) != len(part_sizes):
        raise ValueError(f"{len(delta.parts)} parts given, the table has {len(part_sizes)}: sizes {part_sizes}")
    parts = tuple(
        None if part is None else _fit_part(f"part {index}", part, in_features, size, dtype)
        for index, (part, size) in enumerate(zip(delta.parts, part_sizes, strict=True))
    )
    in_scale = _fit_vector("in_scale", delta.in_scale, in_features)
    if in_scale is None and not any(part is not None and any(piece is not None for piece in part) for part in parts):
        raise ValueError("the delta changes nothing: no part has factors, a scale or a shift")
    return SlotDelta(parts, in_scale)


def _fit_part(where: str, part: PartDelta, in_features: int, out_features: int, dtype: torch.dtype) -> PartDelta:
    return PartDelta(
        None if part.factors is None else _fit_factors(where, part.factors, in_features, out_features, dtype),
        _fit_vector(f"{where}: out_scale", part.out_scale, out_features),
        _fit_vector(f"{where}: shift", part.shift, out_features),
    )


def _fit_factors(where: str, factors: Factors, in_features: int, out_features: int, dtype: torch.dtype) -> Factors:
    shape_a, shape_b = tuple(factors.a.shape), tuple(factors.b.shape)
    rank = shape_a[0] if len(shape_a) == 2 else 0
    if rank < 1 or shape_a != (rank, in_features) or shape_b != (out_features, rank):
        raise ValueError(
            f"{where}: A is {list(shape_a)} and B is {list(shape_b)}, "
            f"must be [r, {in_features}] and [{out_features}, r] with r >= 1"
        )
    fitted = Factors(factors.a.to(dtype), factors.b.to(dtype))
    for name, tensor in zip("AB", fitted, strict=True):
        _check_finite(f"{where}: {name}", tensor)
    return fitted


def _fit_vector(where: str, vector: torch.Tensor | None, size: int) -> torch.Tensor | None:
    if vector is None:
        return None
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{where} is {list(vector.shape)}, must be [{size}]")
    fitted = vector.float()
    _check_finite(where, fitted)
    return fitted


def _check_finite(where: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where} holds values that are not finite in {tensor.dtype}")


def tensors_of(delta: SlotDelta) -> list[torch.Tensor]:
    """Every tensor of a delta."""
    found = [delta.in_scale]
    for part in delta.parts:
        if part is not None:
            found += [*(part.factors or ()), part.out_scale, part.shift]
    return [tensor for tensor in found if tensor is not None]


def check_rows(y: torch.Tensor, rows: torch.Tensor, num_rows: int, part_sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless ``y`` and ``rows`` (x or token ids) fit the step's ``num_rows`` and the table's parts."""
    expected = (num_rows, sum(part_sizes))
    if y.shape != expected or rows.shape[0] != num_rows:
        raise ValueError(
            f"y is {list(y.shape)} and its input {list(rows.shape)}, the step and the table need y {list(expected)} "
            f"and {num_rows} input rows"
        )
