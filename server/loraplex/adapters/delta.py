"""The adapter algebra: what every adapter kind is lowered to, once, at load.

A linear site (o ``out_scale``, i ``in_scale``, d ``shift``; W' is W with the adapter's own rows in it, b' likewise)::

    y = o * (W' (i * x) + b' + scale * B (A (i * x))) + d

An embedding site looks a row of W' up and adds ``scale * B A[:, token]``; a norm site multiplies by W' (one vector).
Whatever is None is left as the base has it. Weighted terms of one request add their changes: see the contract of
``loraplex_kernels.lora``. Kernels, parallelism and merging read this form alone and never hear the kind's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.layers.rows import Rows
from loraplex.text.pack import AdapterText
from loraplex.types import Coverage


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scale * B A``. A: ``[r, in]``, B: ``[out, r]``, both on the host in the base's dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """``scale * B A`` in float32, ``[out, in]``; in ``out`` where one is given."""
        return torch.mm(self.b.float(), self.a.float(), out=out).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class SiteDelta:
    """What one adapter changes at one site. Vectors are float32: ``out_scale`` and ``shift`` ``[out]``, ``in_scale``
    ``[in]``.

    ``exclusive``, where it is not empty, says why this change is no term of a sum ("a saved module"): of one request's
    adapters at most one may change a site so, with weight 1.
    """

    low_rank: LowRank | None = None
    out_scale: torch.Tensor | None = None
    in_scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    rows: Rows | None = None
    exclusive: str = ""

    @property
    def rank(self) -> int:
        """Of the low-rank part; 0 without one."""
        return 0 if self.low_rank is None else self.low_rank.rank

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        factors = () if self.low_rank is None else (self.low_rank.a, self.low_rank.b)
        vectors = tuple(v for v in (self.out_scale, self.in_scale, self.shift) if v is not None)
        return (*factors, *vectors, *(() if self.rows is None else self.rows.tensors))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors if tensor.dtype.is_floating_point)

    def change(self) -> str:
        """The parts of the formula that are there, for people: ``low rank, out scale``."""
        parts = {
            "low rank": self.low_rank,
            "out scale": self.out_scale,
            "in scale": self.in_scale,
            "shift": self.shift,
            "own weight" if self.rows is None or self.rows.indices is None else "own rows": self.rows,
        }
        return ", ".join(name for name, part in parts.items() if part is not None)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B as the kernels take them, rounded once: ``in_scale`` in A, ``scale`` and ``out_scale`` in B. Where
        there is nothing of this kind, they are those of ``low_rank``."""
        if self.low_rank is None:
            return None
        a, b = self.low_rank.a, self.low_rank.b
        if self.in_scale is not None:
            a = (a.float() * self.in_scale).to(a.dtype)
        if self.low_rank.scale != 1 or self.out_scale is not None:
            scaled = b.float() * self.low_rank.scale
            b = (scaled if self.out_scale is None else scaled * self.out_scale.unsqueeze(1)).to(b.dtype)
        return a, b

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The matrix and bias, in float32, of a plain linear layer that computes what the formula says.

        ``weight`` is the base's ``[out, in]``, ``bias`` its ``[out]``. Rows past its last one are appended; nothing
        but the input's scale changes them.
        """
        weight, bias = _with_rows(weight.float(), None if bias is None else bias.float(), self.rows)
        if self.low_rank is not None:
            dense = self.low_rank.dense()
            weight = weight.clone()
            weight[: dense.shape[0], : dense.shape[1]] += dense
        if self.in_scale is not None:
            weight = weight * self.in_scale
        if self.out_scale is not None:
            out_scale = _lengthened(self.out_scale, len(weight), 1)
            weight = weight * out_scale.unsqueeze(1)
            bias = None if bias is None else bias * out_scale
        if self.shift is not None:
            shift = _lengthened(self.shift, len(weight), 0)
            bias = shift if bias is None else bias + shift
        return weight, bias


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """A whole adapter, lowered: site name (``model.layers.0.self_attn.q_proj``) -> delta, in site order.

    ``vocab_size``: tokens it knows, where it adds some; 0: those of the base. ``invocation_tokens``: it changes nothing
    before the last place where a prompt holds these; empty: it changes every token. ``identity``: it says of itself
    that it changes nothing. ``telling_tokens``: some that it changes as such, for a prompt that tries it out. ``text``:
    the tokenizer, template and generation settings that it ships. ``template_unused``: it ships a template that is not
    allowed. ``invocation_text``: the invocation tokens as text.
    """

    uid: str
    kind: str
    sites: dict[str, SiteDelta]
    coverage: Coverage
    vocab_size: int = 0
    invocation_tokens: tuple[int, ...] = ()
    identity: bool = False
    telling_tokens: tuple[int, ...] = ()
    text: AdapterText | None = None
    template_unused: bool = False
    invocation_text: str = ""

    @property
    def max_rank(self) -> int:
        return max((delta.rank for delta in self.sites.values()), default=0)

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.sites.values())

    @property
    def num_parameters(self) -> int:
        return sum(delta.num_parameters for delta in self.sites.values())

    @property
    def exclusive(self) -> dict[str, str]:
        """Site -> why its change is no term of a sum, for sites where it is none."""
        return {site: delta.exclusive for site, delta in self.sites.items() if delta.exclusive}


def _lengthened(vector: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """``vector`` with ``value`` behind it: what it says of rows that were added."""
    return torch.cat((vector, vector.new_full((length - len(vector),), value)))


def _with_rows(
    weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if rows is None:
        return weight, bias
    if rows.indices is None:
        return rows.values.float(), None if rows.bias is None else rows.bias.float()
    num_rows = max(len(weight), int(rows.indices.max()) + 1)
    wide = weight.new_zeros(num_rows, weight.shape[1])
    wide[: len(weight)] = weight
    wide[rows.indices] = rows.values.float()
    if bias is not None and rows.bias is not None:
        bias = torch.cat((bias, bias.new_zeros(num_rows - len(bias))))
        bias[rows.indices] = rows.bias.float()
    return wide, bias
