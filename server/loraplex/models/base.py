"""What the engine asks of a base model. An architecture is one file that answers this."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.layers.rows_memory import MergedForm
from loraplex.layers.rows_table import RowsTable
from loraplex.layers.step import StateStep
from loraplex.models.sites import Site
from loraplex_kernels.attention import AttentionPlan, KVCache
from loraplex_kernels.lora import LoraTable, StepPlan
from loraplex_kernels.segments import SegmentPlan
from loraplex_kernels.states import StateShape


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step as tensors. Rows are ordered by (phase, adapter): decodes first, then prefill chunks."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    attention: AttentionPlan | None  # None: the model has no attention
    kv_cache: KVCache | None
    adapters: StepPlan  # segments over the T rows
    states: StateStep | None = None  # None: the model has no state-space layers


@dataclass(frozen=True, slots=True)
class TableRef:
    """Where a site's changes live: its low-rank factors, scales and shift in a part of ``table`` (None: a norm has
    none), its own rows in ``rows``. ``folded``: where the layer that it is that part of is kept whole with an adapter
    folded in; None: it is no part of a linear layer, or the head."""

    table: LoraTable | None
    part: int
    rows: RowsTable
    folded: RowsTable | None = None


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What attention layers need of the key/value cache."""

    num_layers: int
    kv_heads: int
    head_dim: int


class BaseModel(Protocol):
    """A loaded base model of one rank."""

    architecture: str
    vocab_size: int
    max_position: int
    hidden_size: int
    #: the head multiplies by the embedding's matrix
    tied: bool
    #: beginnings of module names as others spell them, each with its own: adapters may have either
    aliases: tuple[tuple[str, str], ...]
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    #: that hold it together
    num_ranks: int

    @property
    def limits_prompt_steps(self) -> bool:
        """Whether a token of the prompt is computed otherwise than the same one generated: what is kept of generated
        tokens is of no use to a prompt then."""
        ...

    def sites(self) -> tuple[Site, ...]:
        """Every adaptable module, in checkpoint order."""
        ...

    def tables(self) -> dict[str, TableRef]:
        """Site name -> where its changes are written. Sites packed into one layer share a table."""
        ...

    def dense_weight(self, site: str) -> torch.Tensor:
        """The base's weight at ``site``, dense, as ``Site.weight_shape`` has it, of what this rank holds. Read-only."""
        ...

    def dense_bias(self, site: str) -> torch.Tensor | None:
        """The base's bias at ``site``, ``[out]``; None where it has none. Read-only."""
        ...

    def has_own_rows(self, plan: SegmentPlan) -> bool:
        """Whether an adapter of the plan has rows of its own at any site: what a step then launches depends on them."""
        ...

    def merged_form(self, plan: SegmentPlan) -> MergedForm | None:
        """What all rows of the plan are computed with, if that is one merged form: what a step then launches depends on
        that and the number of its rows alone."""
        ...

    def kv_spec(self) -> KVSpec | None:
        """None: it has no attention."""
        ...

    def state_shape(self) -> StateShape | None:
        """What one sequence's states are on this rank; None: it has no state-space layers."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the last norm, ``[T, H]``."""
        ...

    def forward_in_pieces(self, batch: ForwardBatch) -> Generator[None, None, torch.Tensor]:
        """``forward``, with a pause after each layer, in which other batches may run; returns what ``forward`` does.

        For work that must not hold up the steps. Nothing that ``batch`` names may change until it has ended.
        """
        ...

    def head(self, hidden: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """Logits ``[S, V]`` in float32 of rows ``[S, H]``; ``adapters`` are segments over those S rows.

        Where an adapter of the rows adds vocabulary they are as wide as the widest one's, and -inf past a row's own.
        """
        ...
