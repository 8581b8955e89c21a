"""Rows of a layer's matrix that one adapter has of its own: saved modules, trained tokens, added vocabulary, norms.

As values: what an adapter brings (``Rows``), what a site takes (``RowsSite``), the form in which a layer computes with
them (``PackedRows``), and whose rows of a step they are for (``OwnedRows``). Which slot has which is a ``RowsTable``'s
(``layers/rows_table.py``).

A row past the base's last one is an added token's. Low-rank tables are as large as the base, so nothing of a table is
ever added to such a row: it is the whole answer for its token.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from loraplex.quant.base import Placement, Weight
from loraplex.quant.dense import PlainWeight, dense_weight, packs


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a site's matrix that are the adapter's own, in the base's dtype, on the host.

    ``values``: ``[k, in]`` of a linear site, ``[k, hidden]`` of an embedding (one row a token), ``[n]`` of a norm or
    another vector, ``[channels, width]`` of a convolution; those two have all rows.
    ``indices``: ``[k]`` int64, rising, of the rows they stand for, which may lie past the base's last one (added
    vocabulary); None: all rows. ``bias``: ``[k]``, the whole bias of those rows; None where the site has none.
    """

    values: torch.Tensor
    indices: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.values, self.indices, self.bias) if tensor is not None)


class RowsForm(enum.Enum):
    """What a site does with its matrix."""

    MULTIPLIED = "multiplied"
    LOOKED_UP = "looked up"
    #: a norm's one vector, or a vector of the heads
    ELEMENTWISE = "elementwise"
    #: the kernel of a convolution of each channel by itself
    CONVOLVED = "convolved"


@dataclass(frozen=True, slots=True)
class RowsSite:
    """What a site's own rows must fit. ``num_rows`` and ``width`` are the base's ``[out, in]``, ``[vocab, hidden]`` of
    an embedding, ``[channels, width]`` of a convolution; a vector is ``num_rows`` numbers. ``grows``: rows past the
    base's last one make sense. ``folded``: a slot has the whole of a packed layer here, an adapter folded into it, and
    with a bias where that adapter needs one, whatever the base has."""

    form: RowsForm
    num_rows: int
    width: int
    dtype: torch.dtype
    bias: bool = False
    grows: bool = False
    folded: bool = False

    @property
    def is_multiplied(self) -> bool:
        return self.form is RowsForm.MULTIPLIED

    def fit(self, rows: Rows) -> Rows:
        """``rows`` in this site's dtype, checked. Raises ValueError, in shapes and numbers, for rows that do not fit or
        are not finite in it."""
        shape, indices = tuple(rows.values.shape), rows.indices
        self._check_shape(shape, indices)
        count = shape[0]
        if indices is not None:
            self._check_indices(indices, count)
        strange = (rows.bias is None) == self.bias and not self.folded
        if strange or (rows.bias is not None and tuple(rows.bias.shape) != (count,)):
            has = "none" if rows.bias is None else list(rows.bias.shape)
            raise ValueError(f"the bias of the own rows is {has}, must be {[count] if self.bias else 'none'}")
        bias = None if rows.bias is None else _owned(rows.bias.to(self.dtype))
        fitted = Rows(_owned(rows.values.to(self.dtype)), None if indices is None else _owned(indices), bias)
        for name, tensor in (("own rows", fitted.values), ("the bias of the own rows", fitted.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: values that are not finite in {self.dtype}")
        return fitted

    def _check_shape(self, shape: tuple[int, ...], indices: torch.Tensor | None) -> None:
        if self.form is RowsForm.ELEMENTWISE:
            if shape != (self.num_rows,) or indices is not None:
                raise ValueError(f"own rows are {list(shape)}, must be all of [{self.num_rows}]")
            return
        fits = len(shape) == 2 and shape[1] == self.width and shape[0] > 0
        whole = indices is None or self.form is RowsForm.CONVOLVED
        if fits and whole:
            fits = shape[0] >= self.num_rows if self.grows else shape[0] == self.num_rows
        if fits and whole and indices is not None:
            raise ValueError(f"own rows are {list(shape)} by index, must be all of [{self.num_rows}, {self.width}]")
        if not fits:
            least = f"{self.num_rows}{' or more' if self.grows else ''}" if whole else "1 or more"
            raise ValueError(f"own rows are {list(shape)}, must be [{least}, {self.width}]")

    def _check_indices(self, indices: torch.Tensor, count: int) -> None:
        if indices.dtype is not torch.int64 or tuple(indices.shape) != (count,):
            raise ValueError(
                f"indices of the own rows are {indices.dtype} {list(indices.shape)}, must be torch.int64 [{count}]"
            )
        first, last = int(indices[0]), int(indices[-1])
        if bool((indices.diff() <= 0).any()) or first < 0 or (last >= self.num_rows and not self.grows):
            raise ValueError(
                f"indices of the own rows run from {first} to {last}, must rise"
                f"{'' if self.grows else f' and be below {self.num_rows}'}"
            )


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedRows:
    """Rows as a layer computes with them; never changed once made. ``key``: equal content has equal keys.

    ``values`` is None where only the form that multiplies fastest is kept, ``weight`` for a norm. The first
    ``num_known`` of them stand for rows that the base has, the ``num_added`` others for rows past its last one.
    """

    key: str
    values: torch.Tensor | None  # [k, width], [n] of a norm
    weight: Weight | None  # [k, width]
    indices: torch.Tensor | None  # [k] int64
    bias: torch.Tensor | None  # [k]
    num_known: int
    num_added: int
    #: one past the highest row they stand for
    reach: int
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Whether all rows of the base are replaced."""
        return self.indices is None

    def on(self, device: torch.device) -> PackedRows:
        """A copy on a device that multiplies by plain tensors, behind the work launched there so far.

        Raises MemoryError, with numbers, when the device has no room.
        """
        assert self.values is not None, "rows that were packed for another device"
        try:
            values = self.values.to(device, non_blocking=True)
            indices = None if self.indices is None else self.indices.to(device, non_blocking=True)
            bias = None if self.bias is None else self.bias.to(device, non_blocking=True)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{device} has no room for {self.nbytes} bytes of an adapter's own rows") from error
        weight = None if self.weight is None else PlainWeight(values)
        return PackedRows(
            self.key, values, weight, indices, bias, self.num_known, self.num_added, self.reach, self.nbytes
        )

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, in]`` -> ``[n, k]``, bias included."""
        assert self.weight is not None
        return self.weight.matmul(x, self.bias)

    def put_known_(self, y: torch.Tensor, product: torch.Tensor) -> None:
        """Put the columns of ``product`` ``[n, k]`` that the base has into ``y`` ``[n, num_rows]``."""
        if self.indices is None:
            y.copy_(product[:, : self.num_known])
        else:
            y.index_copy_(1, self.indices[: self.num_known], product[:, : self.num_known])

    def put_added_(self, y: torch.Tensor, product: torch.Tensor) -> None:
        """Put the other columns into ``y`` ``[n, width >= reach]``, which may be of another dtype."""
        added = product[:, self.num_known :]
        if self.indices is None:
            y[:, self.num_known : self.reach] = added
        else:
            y.index_copy_(1, self.indices[self.num_known :], added.to(y.dtype))

    def look_up_(self, x: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put the own rows of ``token_ids`` ``[n]`` into ``x`` ``[n, H]``; tokens without one keep what is there."""
        assert self.values is not None
        if self.indices is None:
            x.copy_(F.embedding(token_ids, self.values))
            return
        places = torch.searchsorted(self.indices, token_ids).clamp_(max=len(self.indices) - 1)
        hit = self.indices[places] == token_ids
        x.copy_(torch.where(hit.unsqueeze(1), self.values[places], x))


@dataclass(frozen=True, slots=True)
class OwnedRows:
    """Rows of a step whose adapters have the same own rows at a site."""

    segment: slice
    rows: PackedRows

    @property
    def num_rows(self) -> int:
        return int(self.segment.stop) - int(self.segment.start)


def pack_rows(rows: Rows, site: RowsSite, key: str, device: torch.device) -> PackedRows:
    """``rows``, which fit ``site``, as layers on ``device`` take them; still on the host where that is another one."""
    if device.type == "cuda":
        indices, bias = (tensor if tensor is None else tensor.pin_memory() for tensor in (rows.indices, rows.bias))
        rows = Rows(rows.values.pin_memory(), indices, bias)
    values: torch.Tensor | None = rows.values
    weight: Weight | None = None
    if is_repacked(site, device):
        weight, values = dense_weight(rows.values), None
    elif site.form is not RowsForm.ELEMENTWISE:
        weight = PlainWeight(rows.values)
    count = len(rows.values)
    num_known = site.num_rows if rows.indices is None else int((rows.indices < site.num_rows).sum())
    stored = rows.values.nbytes if weight is None else weight.nbytes
    return PackedRows(
        key=key,
        values=values,
        weight=weight,
        indices=rows.indices,
        bias=rows.bias,
        num_known=num_known,
        num_added=count - num_known,
        reach=count if rows.indices is None else int(rows.indices[-1]) + 1,
        nbytes=stored + sum(tensor.nbytes for tensor in (rows.indices, rows.bias) if tensor is not None),
    )


def is_repacked(site: RowsSite, device: torch.device) -> bool:
    """Whether rows of ``site`` are kept in a form that only multiplies."""
    return site.form is RowsForm.MULTIPLIED and packs(Placement(device, site.dtype))


def content_key(rows: Rows, *what: object) -> str:
    """A digest of all that ``rows`` hold, and of ``what``."""
    digest = hashlib.sha256(repr(what).encode())
    for name, tensor in (("values", rows.values), ("indices", rows.indices), ("bias", rows.bias)):
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and no view of a larger piece of memory, such as a file's: that would be kept, too."""
    whole = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if whole else tensor.contiguous()
