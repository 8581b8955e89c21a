"""The pre-norm decoder that every family here is an instance of: embedding, layers, last norm, head."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from loraplex.layers.embedding import Embedding, Head
from loraplex.layers.norm import RMSNorm
from loraplex.layers.rotary import Rotary
from loraplex.layers.rows_memory import MergedForm, RowsMemory
from loraplex.layers.step import LayerStep
from loraplex.models.base import ForwardBatch, KVSpec, TableRef
from loraplex.models.mixers.base import Held, HeldSmall, Mixer
from loraplex.models.sites import Site
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import Placement
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.segments import SegmentPlan
from loraplex_kernels.states import StateShape


@dataclass(frozen=True, slots=True)
class DecoderBlock:
    """``x += scale * (the sum of the mixers of norm(x))``, and all that holds its sites."""

    norm: RMSNorm
    mixers: tuple[Mixer, ...]
    scale: float
    held: tuple[Held, ...]

    def add_(self, x: torch.Tensor, step: LayerStep) -> None:
        """This block on the residual stream ``[T, H]``, in place."""
        normed = self.norm(x if x.dtype == self.norm.weight.dtype else x.to(self.norm.weight.dtype), step.adapters)
        y = self.mixers[0](normed, step)
        for mixer in self.mixers[1:]:
            y += mixer(normed, step)
        x.add_(y, alpha=self.scale)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Blocks, one after the other."""

    blocks: tuple[DecoderBlock, ...]

    def add_(self, x: torch.Tensor, step: LayerStep) -> None:
        """One layer on the residual stream ``[T, H]``, in place."""
        for block in self.blocks:
            block.add_(x, step)


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """Everything a decoder owns. ``weight_bytes`` counts each stored form of a matrix once."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Head
    rotary: Rotary | None
    weight_bytes: int
    own_rows: RowsMemory
    num_ranks: int


class Decoder:
    """A loaded base model of one rank (``models.base.BaseModel``)."""

    def __init__(self, spec: DecoderSpec, placement: Placement, parts: DecoderParts) -> None:
        self._spec = spec
        self._parts = parts
        self.architecture = spec.architecture
        self.vocab_size = spec.vocab_size
        self.max_position = spec.max_position
        self.hidden_size = spec.hidden_size
        self.tied = spec.tied
        self.aliases = spec.names.aliases
        self.dtype = placement.dtype
        self.device = placement.device
        self.weight_bytes = parts.weight_bytes
        self.num_ranks = parts.num_ranks
        self._held = {site: held for held in self._all_held() for site in held.refs()}

    @property
    def limits_prompt_steps(self) -> bool:
        """Whether a token of the prompt is computed otherwise than the same one generated: its time steps have
        limits."""
        return any(mixer.limits_steps for mixer in self._spec.mambas)

    def sites(self) -> tuple[Site, ...]:
        return self._spec.sites()

    def tables(self) -> dict[str, TableRef]:
        embedding, head = self._parts.embedding, self._parts.head
        refs = {end.site: TableRef(end.table, 0, end.rows) for end in (embedding, head)}
        for held in self._all_held():
            refs.update(held.refs())
        return {site.name: refs[site.name] for site in self.sites()}

    def dense_weight(self, site: str) -> torch.Tensor:
        """The base's weight at ``site``, dense, as ``Site.weight_shape`` has it, of what this rank holds. Read-only."""
        if site == self._parts.embedding.site or (site == self._parts.head.site and self._spec.tied):
            return self._parts.embedding.weight.dequantize()
        if site == self._parts.head.site:
            return self._parts.head.weight.dequantize()
        return self._held[site].weight(site)

    def dense_bias(self, site: str) -> torch.Tensor | None:
        """The base's bias at ``site``, ``[out]``; None where it has none. Read-only."""
        held = self._held.get(site)
        return None if held is None else held.bias(site)

    def has_own_rows(self, plan: SegmentPlan) -> bool:
        """Whether an adapter of the plan has rows of its own at any site: such a step is launched kernel by kernel."""
        return bool(self._parts.own_rows.slots and self._parts.own_rows.owners(plan))

    def merged_form(self, plan: SegmentPlan) -> MergedForm | None:
        return self._parts.own_rows.merged(plan)

    def state_shape(self) -> StateShape | None:
        return self._spec.state_shape(self.num_ranks)

    def kv_spec(self) -> KVSpec | None:
        return self._spec.kv_spec(self.num_ranks)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the last norm, ``[T, H]``."""
        x, step = self._begin(batch)
        for layer in self._parts.layers:
            layer.add_(x, step)
        return self._end(x, batch)

    def forward_in_pieces(self, batch: ForwardBatch) -> Generator[None, None, torch.Tensor]:
        """``forward``, with a pause after each layer."""
        x, step = self._begin(batch)
        for layer in self._parts.layers:
            layer.add_(x, step)
            yield
        return self._end(x, batch)

    def head(self, hidden: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """Logits ``[S, V]`` in float32 of rows ``[S, H]``; wider where an adapter of the rows adds vocabulary."""
        logits, factor = self._parts.head(hidden, adapters), self._spec.factors.logits
        return logits if factor == 1.0 else logits.mul_(factor)

    def _begin(self, batch: ForwardBatch) -> tuple[torch.Tensor, LayerStep]:
        """The residual stream ``[T, H]``, and what all layers share."""
        parts, factor = self._parts, self._spec.factors.embedding
        x = parts.embedding(batch.token_ids, batch.adapters)
        if factor != 1.0:
            x.mul_(factor)
        if self._spec.residual_in_float32:
            x = x.float()
        rotation = None if parts.rotary is None else parts.rotary(batch.positions)
        return x, LayerStep(batch.adapters, rotation, batch.attention, batch.kv_cache, batch.states)

    def _end(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self._parts.norm(x.to(self.dtype), batch.adapters)

    def _all_held(self) -> Iterator[Held]:
        for layer in self._parts.layers:
            for block in layer.blocks:
                yield from block.held
        yield HeldSmall(self._parts.norm)
