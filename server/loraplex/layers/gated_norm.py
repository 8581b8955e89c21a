"""The gated norm behind a state-space scan, whose groups may lie across ranks.

Where a rank holds whole groups, the scan's backend does all of it. Where not, the ranks add up one number for each row
and group: the sum of squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch.nn import functional as F

from loraplex.layers.rows_table import RowsTable
from loraplex.parallel.group import TPGroup
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.ssd import GateNorm, SsdBackend


@dataclass(frozen=True, slots=True)
class NormGroups:
    """How one rank's heads fall into ``total`` groups of ``width`` values: runs of equal length, ``blocks`` naming the
    group of each. ``whole``: each run is a whole group."""

    total: int
    width: int
    blocks: tuple[int, ...]
    whole: bool

    @staticmethod
    def of(heads: slice, num_heads: int, total: int, head_dim: int) -> NormGroups:
        """Of the heads ``heads`` out of ``num_heads``."""
        per_group = num_heads // total
        run = gcd(heads.stop - heads.start, per_group)
        blocks = tuple(head // per_group for head in range(heads.start, heads.stop, run))
        return NormGroups(total, per_group * head_dim, blocks, run == per_group)


class GatedNorm:
    """``[T, D]`` and its gate ``[T, D]`` -> ``[T, D]``; the formula is ``loraplex_kernels.ssd``'s.

    Source: Dao and Gu 2024, section 7; transformers' MambaRMSNormGated and FalconH1RMSNormGated.
    """

    __slots__ = ("_backend", "_gate", "_group", "_groups", "_held", "_index", "rows", "site", "weight")

    def __init__(
        self,
        site: str,
        norm: GateNorm,
        groups: NormGroups,
        *,
        rows: RowsTable,
        backend: SsdBackend,
        group: TPGroup,
    ) -> None:
        """``norm`` with this rank's part of the weight; its groups are those held here."""
        assert norm.weight is not None
        self.site = site
        self.weight = norm.weight
        self.rows = rows
        self._held = rows.held
        self._gate = norm
        self._groups = groups
        self._backend = backend
        self._group = group
        self._index = torch.tensor(groups.blocks, device=norm.weight.device)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, y: torch.Tensor, z: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        gate = self._gate
        if self._held and (owned := self.rows.of(adapters)):
            weight = self.weight.expand(len(y), -1).clone()
            for one in owned:
                assert one.rows.values is not None
                weight[one.segment] = one.rows.values
            gate = GateNorm(weight, gate.groups, gate.eps, gate.norm_before_gate)
        if self._groups.whole:
            return self._backend.gate(y, z, gate)
        return self._over_ranks(y, z, gate)

    def _over_ranks(self, y: torch.Tensor, z: torch.Tensor, gate: GateNorm) -> torch.Tensor:
        groups, weight = self._groups, gate.weight
        assert weight is not None
        factor, values = F.silu(z.float()), y.float()
        if not gate.norm_before_gate:
            values = values * factor
        runs = values.view(len(y), len(groups.blocks), -1)
        squares = values.new_zeros(len(y), groups.total).index_add_(1, self._index, runs.square().sum(-1))
        self._group.all_reduce_(squares)
        scale = torch.rsqrt(squares / groups.width + gate.eps)[:, self._index]
        out = (runs * scale.unsqueeze(-1)).flatten(1) * weight.float()
        return (out * factor if gate.norm_before_gate else out).to(y.dtype)
