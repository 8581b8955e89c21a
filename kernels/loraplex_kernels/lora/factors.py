"""What every backend checks before it stores an adapter's factors; knows no layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.lora import Factors


def fit_parts(
    slot: int, parts: Sequence[Factors | None], *, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[Factors | None, ...]:
    """The factors in the table's dtype, or ValueError naming slot, part and shapes.

    Non-finite values are refused here, after rounding to ``dtype``, because no backend could keep them from other
    rows cheaply: inside a product over several adapters' rows, ``0 * NaN`` is NaN.
    """
    if slot < 0:
        raise ValueError(f"slot {slot} is negative")
    if len(parts) != len(part_sizes):
        raise ValueError(f"slot {slot}: {len(parts)} parts given, the table has {len(part_sizes)}: sizes {part_sizes}")
    return tuple(
        None if part is None else _fit(f"slot {slot}, part {index}", part, in_features, size, dtype)
        for index, (part, size) in enumerate(zip(parts, part_sizes, strict=True))
    )


def _fit(where: str, part: Factors, in_features: int, out_features: int, dtype: torch.dtype) -> Factors:
    shape_a, shape_b = tuple(part.a.shape), tuple(part.b.shape)
    rank = shape_a[0] if len(shape_a) == 2 else 0
    if rank < 1 or shape_a != (rank, in_features) or shape_b != (out_features, rank):
        raise ValueError(
            f"{where}: A is {list(shape_a)} and B is {list(shape_b)}, "
            f"must be [r, {in_features}] and [{out_features}, r] with r >= 1"
        )
    fitted = Factors(part.a.to(dtype), part.b.to(dtype))
    for name, tensor in zip("AB", fitted, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name} holds values that are not finite in {dtype}")
    return fitted


def check_rows(y: torch.Tensor, rows: torch.Tensor, num_rows: int, part_sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless ``y`` and ``rows`` (x or token ids) fit the step's ``num_rows`` and the table's parts."""
    expected = (num_rows, sum(part_sizes))
    if y.shape != expected or rows.shape[0] != num_rows:
        raise ValueError(
            f"y is {list(y.shape)} and its input {list(rows.shape)}, the step and the table need y {list(expected)} "
            f"and {num_rows} input rows"
        )
