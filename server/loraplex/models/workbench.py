"""What a model's parts are built with: one pass over a checkpoint, which gives each layer what this rank holds of it.

Each checkpoint tensor is read once, in checkpoint order, straight into the layer it belongs to. Knows sites and how
they are cut, and no family.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from loraplex.layers.embedding import FOREIGN_COLUMNS, Changes, Embedding, Head
from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.norm import RMSNorm
from loraplex.layers.own_tensor import OwnTensor
from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex.models.sites import SiteKind
from loraplex.models.spec import DecoderSpec
from loraplex.parallel.group import TPGroup, solo
from loraplex.parallel.shard import Part, Shard, check_group, length
from loraplex.quant.base import Placement, Rows, Slab, Weight
from loraplex.quant.dense import dense_weight, packs
from loraplex.quant.loading import QuantizedWeight, Storage
from loraplex_kernels.attention import AttentionBackend
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.conv.reference import ReferenceConv
from loraplex_kernels.lora import LoraBackend, LoraTable
from loraplex_kernels.quant import QuantBackend
from loraplex_kernels.quant.reference import ReferenceQuant
from loraplex_kernels.ssd import SsdBackend
from loraplex_kernels.ssd.reference import ReferenceSsd


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a model is given by its server: op backends, the bytes each adapter table may grow to, its ranks."""

    lora: LoraBackend
    attention: AttentionBackend
    adapter_memory: int
    group: TPGroup = field(default_factory=solo)
    quant: QuantBackend = field(default_factory=ReferenceQuant)
    conv: ConvBackend = field(default_factory=ReferenceConv)
    ssd: SsdBackend = field(default_factory=ReferenceSsd)


@dataclass(frozen=True, slots=True)
class Materials:
    """What a decoder is built from."""

    spec: DecoderSpec
    storage: Storage
    runtime: Runtime

    @property
    def placement(self) -> Placement:
        return self.storage.placement


class Workbench:
    """Makes layers of sites; counts the bytes it keeps, and the layers that have a cache or states."""

    def __init__(self, materials: Materials) -> None:
        """Raises UnsupportedFeature when the group's size does not divide a dimension it cuts."""
        self.runtime = materials.runtime
        self.group = materials.runtime.group
        self.placement = materials.placement
        #: of everything made so far; each stored form of a matrix counts once
        self.weight_bytes = 0
        self.rows_memory = RowsMemory(self.runtime.lora.slots, self.placement.device)
        self._storage = materials.storage
        self._sites = {site.name: site for site in materials.spec.sites()}
        self._matrices = materials.spec.matrices()
        self._num_kv_layers = self._num_state_layers = 0
        check_group(self.group.size, (site.cut for site in self._sites.values()))

    # ---- layers ----

    def linear(self, *names: str) -> Linear:
        """One layer of these sites, which are cut alike."""
        parts, shard = [self.part(name) for name in names], self._sites[names[0]].cut.shard
        slabs = tuple(
            Slab(self._matrices[name], rows, part.cols)
            for name, part in zip(names, parts, strict=True)
            for rows in part.rows
        )
        weight = self._weight(slabs)
        bias = None
        if self._sites[names[0]].bias and (shard is not Shard.ROW or parts[0].leads):
            bias = torch.cat([self._read(f"{name}.bias", part.rows) for name, part in zip(names, parts, strict=True)])
        table = self._table(length(parts[0].cols), *(length(part.rows) for part in parts))
        sizes = table.in_features, bias is not None
        rows = tuple(self.rows(RowsForm.MULTIPLIED, size, *sizes) for size in table.part_sizes)
        return Linear(names, LinearParts(weight, bias, table, rows), shard, self.group)

    def norm(self, site: str, eps: float) -> RMSNorm:
        """A norm that every rank holds whole."""
        weight = self.tensor(site)
        return RMSNorm(site, weight, eps, self.rows(RowsForm.ELEMENTWISE, len(weight), 1))

    def own_tensor(self, name: str, form: RowsForm) -> OwnTensor:
        """A small parameter."""
        site = self._sites[name]
        weight = self.tensor(name)
        bias = self._read(f"{name}.bias", self.part(name).rows) if site.bias else None
        width = site.in_features if site.kind is SiteKind.CONV else 1
        return OwnTensor(name, weight, bias, self.rows(form, len(weight), width, site.bias))

    def embedding(self, name: str) -> tuple[Embedding, Rows]:
        """The embedding, and its matrix, which a tied head multiplies by."""
        matrix, vocab = self._matrices[name], self.part(name).cols
        rows = self._storage.rows(Slab(matrix, vocab, slice(0, matrix.in_features)))
        self.weight_bytes += rows.nbytes
        num_tokens, hidden = length(vocab), matrix.in_features
        columns = num_tokens if self.group.size == 1 else num_tokens + FOREIGN_COLUMNS
        own = self.rows(RowsForm.LOOKED_UP, num_tokens, hidden, grows=True)
        changes = Changes(self._table(columns, hidden), own)
        return Embedding(name, rows, changes, matrix.out_features, self.group), rows

    def head(self, name: str, tied_to: Rows | None) -> Head:
        """The head. ``tied_to``: the matrix of the embedding that it shares."""
        site, part = self._sites[name], self.part(name)
        weight: Weight
        if tied_to is None:
            weight = self._weight(tuple(Slab(self._matrices[name], rows, part.cols) for rows in part.rows))
        elif isinstance(tied_to, QuantizedWeight):
            weight = tied_to
        else:
            # lookups need rows, products the packed form: only where those differ is there a second copy
            weight = dense_weight(tied_to.dequantize())
            self.weight_bytes += weight.nbytes if packs(self.placement) else 0
        table = self._table(site.in_features, length(part.rows))
        rows = self.rows(RowsForm.MULTIPLIED, length(part.rows), site.in_features, grows=True)
        return Head(name, weight, Changes(table, rows), self.group)

    # ---- what they are made of ----

    def part(self, site: str) -> Part:
        """What this rank holds of a site."""
        return self._sites[site].part(self.group.rank, self.group.size)

    def num_rows(self, site: str) -> int:
        """How many outputs of a site this rank holds."""
        return length(self.part(site).rows)

    def tensor(self, site: str) -> torch.Tensor:
        """This rank's part of the weight of a small site, in a shape of its own."""
        return self._read(self._sites[site].weight_key, self.part(site).rows)

    def rows(self, form: RowsForm, num_rows: int, width: int, bias: bool = False, *, grows: bool = False) -> RowsTable:
        """A table of adapters' own rows of ``num_rows`` of the base's, each ``width`` numbers."""
        return RowsTable(RowsSite(form, num_rows, width, self.placement.dtype, bias, grows), self.rows_memory)

    def next_kv_layer(self) -> int:
        """The number of a layer that attends, counted from 0."""
        self._num_kv_layers += 1
        return self._num_kv_layers - 1

    def next_state_layer(self) -> int:
        """The number of a layer that keeps states, counted from 0."""
        self._num_state_layers += 1
        return self._num_state_layers - 1

    def _weight(self, slabs: tuple[Slab, ...]) -> Weight:
        weight = self._storage.weight(slabs)
        self.weight_bytes += weight.nbytes
        return weight

    def _read(self, key: str, runs: tuple[slice, ...]) -> torch.Tensor:
        placement = self.placement
        tensors = [self._storage.reader.tensor(key, rows) for rows in runs]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        kept = whole.to(device=placement.device, dtype=placement.dtype, copy=True).contiguous()
        self.weight_bytes += kept.nbytes
        return kept

    def _table(self, in_features: int, *part_sizes: int) -> LoraTable:
        placement, runtime = self.placement, self.runtime
        return runtime.lora.new_table(
            in_features,
            part_sizes,
            dtype=placement.dtype,
            device=placement.device,
            max_bytes=runtime.adapter_memory,
        )
