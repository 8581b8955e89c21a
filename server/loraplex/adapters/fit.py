"""Whether what a kind answered is a change of this base model: the check between kinds, which may be anybody's, and
everything that reads the algebra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.errors import InternalError
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site

#: a tensor's name, itself, and the shape and dtype it should have
_Expected = tuple[str, torch.Tensor, tuple[int, ...], torch.dtype]


def check_fit(sites: Mapping[str, SiteDelta], base: BaseView, kind: str) -> None:
    """Raises InternalError: an answer that does not fit: the mistake is the kind's, not the adapter's; names both."""
    known = base.by_name()
    for name, delta in sites.items():
        site = known.get(name)
        if site is None:
            raise InternalError(f"kind {kind}: answered with a site {name[:200]!r}, which the model does not have")
        complaint = _complaint(site, delta, base.dtype)
        if complaint:
            raise InternalError(f"kind {kind}: at {name!r} it answered {complaint}")


def _complaint(site: Site, delta: SiteDelta, dtype: torch.dtype) -> str:
    """What is wrong with a site's change; empty: nothing."""
    if not delta.change():
        return "a change of nothing; a site that is left alone is left out"
    multiplied = (delta.low_rank, delta.out_scale, delta.in_scale, delta.shift)
    if not site.has_matrix and any(part is not None for part in multiplied):
        return f"{delta.change()}, but a {site.kind} can have nothing but an own weight"
    for what, tensor, shape, wanted in (
        *_factors(site, delta, dtype),
        *_vectors(site, delta),
        *_rows(site, delta, dtype),
    ):
        if (tuple(tensor.shape), tensor.dtype, tensor.device.type) != (shape, wanted, "cpu"):
            return (
                f"{what} of shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}; expected {list(shape)}, "
                f"{wanted} on the host"
            )
    return "" if delta.rows is None else _complaint_of_rows(delta.rows, site, delta.exclusive)


def _complaint_of_rows(rows: Rows, site: Site, exclusive: str) -> str:
    """What is wrong with own rows whose tensors are right."""
    if (rows.bias is not None) is not site.bias:
        return "own rows without a bias, and the site has one" if site.bias else "own rows with a bias the site has not"
    # they take the place of the base's, so a layer has those of one adapter, with weight 1
    return "" if exclusive else "own rows, which are no term of a sum, without saying why in SiteDelta.exclusive"


def _factors(site: Site, delta: SiteDelta, dtype: torch.dtype) -> Iterator[_Expected]:
    if delta.low_rank is not None:
        yield "A", delta.low_rank.a, (delta.rank, site.in_features), dtype
        yield "B", delta.low_rank.b, (site.out_features, delta.rank), dtype


def _vectors(site: Site, delta: SiteDelta) -> Iterator[_Expected]:
    for what, vector, size in (
        ("out_scale", delta.out_scale, site.out_features),
        ("in_scale", delta.in_scale, site.in_features),
        ("shift", delta.shift, site.out_features),
    ):
        if vector is not None:
            yield what, vector, (size,), torch.float32


def _rows(site: Site, delta: SiteDelta, dtype: torch.dtype) -> Iterator[_Expected]:
    rows: Rows | None = delta.rows
    if rows is None:
        return
    whole, *width = site.rows_shape
    count = whole if rows.indices is None else len(rows.indices)
    yield "own rows", rows.values, (count, *width), dtype
    if rows.indices is not None:
        yield "indices of own rows", rows.indices, (count,), torch.int64
    if rows.bias is not None:
        yield "bias of own rows", rows.bias, (count,), dtype
