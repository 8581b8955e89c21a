"""Builds a decoder from a spec and a reader: decides what each rank holds of every tensor, and copies it out.

Each checkpoint tensor is read once, in checkpoint order, straight into the layer it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from loraplex.layers.attention import Attention, AttentionParts, Heads
from loraplex.layers.embedding import FOREIGN_COLUMNS, Changes, Embedding, Head
from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.mlp import ACTIVATIONS, GatedMLP
from loraplex.layers.norm import HeadNorm, RMSNorm
from loraplex.layers.rotary import Rotary
from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex.models.decoder import Decoder, DecoderLayer, DecoderParts
from loraplex.models.spec import EMBED, FINAL_NORM, HEAD, DecoderSpec, layer_name
from loraplex.parallel.group import TPGroup, solo
from loraplex.parallel.shard import Part, Shard, check_group, length
from loraplex.quant.base import Placement, Rows, Slab, Weight
from loraplex.quant.dense import dense_weight, packs
from loraplex.quant.loading import QuantizedWeight, Storage
from loraplex_kernels.attention import AttentionBackend
from loraplex_kernels.lora import LoraBackend, LoraTable
from loraplex_kernels.quant import QuantBackend
from loraplex_kernels.quant.reference import ReferenceQuant


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a model is given by its server: op backends, the bytes each adapter table may grow to, its ranks."""

    lora: LoraBackend
    attention: AttentionBackend
    adapter_memory: int
    group: TPGroup = field(default_factory=solo)
    quant: QuantBackend = field(default_factory=ReferenceQuant)


@dataclass(frozen=True, slots=True)
class Materials:
    """What a decoder is built from."""

    spec: DecoderSpec
    storage: Storage
    runtime: Runtime

    @property
    def placement(self) -> Placement:
        return self.storage.placement


def assemble(materials: Materials) -> Decoder:
    """Read every tensor the spec names and return the model.

    Raises UnsupportedFeature when the group's size does not divide a dimension it cuts.
    """
    return _Assembly(materials).decoder()


class _Assembly:
    """One pass over the checkpoint; counts the bytes it keeps."""

    def __init__(self, materials: Materials) -> None:
        self._materials = materials
        self._spec = materials.spec
        self._group = materials.runtime.group
        self._weight_bytes = 0
        self._rows_memory = RowsMemory(materials.runtime.lora.slots, materials.placement.device)
        self._sites = {site.name: site for site in self._spec.sites()}
        self._matrices = self._spec.matrices()
        check_group(self._group.size, (site.cut for site in self._sites.values()))

    def decoder(self) -> Decoder:
        spec, placement = self._spec, self._materials.placement
        vocab = self._part(EMBED).cols
        embed = self._materials.storage.rows(Slab(self._matrices[EMBED], vocab, slice(0, spec.hidden_size)))
        self._weight_bytes += embed.nbytes
        layers = tuple(self._layer(index) for index in range(spec.num_layers))
        norm = self._norm(FINAL_NORM)
        parts = DecoderParts(
            embedding=Embedding(EMBED, embed, self._embedding_changes(length(vocab)), spec.vocab_size, self._group),
            layers=layers,
            norm=norm,
            head=self._head(embed),
            rotary=Rotary(spec.rotary, dtype=placement.dtype, device=placement.device),
            kv_heads=self._heads(0).kv_heads,
            weight_bytes=self._weight_bytes,
            own_rows=self._rows_memory,
        )
        return Decoder(spec, placement, parts)

    def _head(self, embed: Rows) -> Head:
        spec, (vocab,) = self._spec, self._part(HEAD).rows
        weight: Weight
        if not spec.tied:
            weight = self._weight((Slab(self._matrices[HEAD], vocab, slice(0, spec.hidden_size)),))
        elif isinstance(embed, QuantizedWeight):
            weight = embed
        else:
            # lookups need rows, products the packed form: only where those differ is there a second copy
            weight = dense_weight(embed.dequantize())
            self._weight_bytes += weight.nbytes if packs(self._materials.placement) else 0
        table = self._table(spec.hidden_size, length(vocab))
        rows = self._rows(RowsForm.MULTIPLIED, length(vocab), spec.hidden_size, grows=True)
        return Head(HEAD, weight, Changes(table, rows), self._group)

    def _layer(self, index: int) -> DecoderLayer:
        spec, name = self._spec, layer_name(index)
        attention_norm = self._norm(f"{name}.input_layernorm")
        qkv = self._linear(*(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        o = self._linear(f"{name}.self_attn.o_proj")
        heads = self._heads(index)
        backend = self._materials.runtime.attention
        qk_norm = self._qk_norm(f"{name}.self_attn", heads)
        attention = Attention(heads, AttentionParts(qkv, qk_norm, o, backend))
        mlp_norm = self._norm(f"{name}.post_attention_layernorm")
        gate_up = self._linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        down = self._linear(f"{name}.mlp.down_proj")
        mlp = GatedMLP(gate_up, down, ACTIVATIONS[spec.activation])
        linears, qk_norms = (qkv, o, gate_up, down), () if qk_norm is None else qk_norm.parts
        return DecoderLayer(attention_norm, attention, mlp_norm, mlp, linears, qk_norms)

    def _qk_norm(self, name: str, heads: Heads) -> HeadNorm | None:
        if not self._spec.parts.qk_norm:
            return None
        q_norm, k_norm = self._norm(f"{name}.q_norm"), self._norm(f"{name}.k_norm")
        return HeadNorm(q_norm, k_norm, (heads.heads, heads.kv_heads), self._spec.norm_eps)

    def _norm(self, site: str) -> RMSNorm:
        weight = self._tensor(f"{site}.weight")
        return RMSNorm(site, weight, self._spec.norm_eps, self._rows(RowsForm.ELEMENTWISE, len(weight), 1))

    def _heads(self, index: int) -> Heads:
        spec, attention = self._spec, f"{layer_name(index)}.self_attn"
        q, k = (length(self._part(f"{attention}.{name}").rows) // spec.head_dim for name in ("q_proj", "k_proj"))
        return Heads(index, q, k, spec.head_dim, spec.parts.windows[index])

    def _linear(self, *names: str) -> Linear:
        """One layer of these sites, which are cut alike."""
        parts, shard = [self._part(name) for name in names], self._sites[names[0]].cut.shard
        weight = self._weight(
            tuple(
                Slab(self._matrices[name], run, part.cols)
                for name, part in zip(names, parts, strict=True)
                for run in part.rows
            )
        )
        bias = None
        if self._sites[names[0]].bias and (shard is not Shard.ROW or parts[0].leads):
            runs = ((name, run) for name, part in zip(names, parts, strict=True) for run in part.rows)
            bias = torch.cat([self._tensor(f"{name}.bias", run) for name, run in runs])
        table = self._table(length(parts[0].cols), *(length(part.rows) for part in parts))
        sizes = table.in_features, bias is not None
        rows = tuple(self._rows(RowsForm.MULTIPLIED, size, *sizes) for size in table.part_sizes)
        return Linear(names, LinearParts(weight, bias, table, rows), shard, self._group)

    def _weight(self, slabs: tuple[Slab, ...]) -> Weight:
        weight = self._materials.storage.weight(slabs)
        self._weight_bytes += weight.nbytes
        return weight

    def _part(self, site: str) -> Part:
        """What this rank holds of a site."""
        return self._sites[site].part(self._group.rank, self._group.size)

    def _tensor(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        placement = self._materials.placement
        tensor = self._materials.storage.reader.tensor(key, rows)
        kept = tensor.to(device=placement.device, dtype=placement.dtype, copy=True).contiguous()
        self._weight_bytes += kept.nbytes
        return kept

    def _embedding_changes(self, num_tokens: int) -> Changes:
        hidden = self._spec.hidden_size
        columns = num_tokens if self._group.size == 1 else num_tokens + FOREIGN_COLUMNS
        return Changes(self._table(columns, hidden), self._rows(RowsForm.LOOKED_UP, num_tokens, hidden, grows=True))

    def _rows(self, form: RowsForm, num_rows: int, width: int, bias: bool = False, *, grows: bool = False) -> RowsTable:
        site = RowsSite(form, num_rows, width, self._materials.placement.dtype, bias, grows)
        return RowsTable(site, self._rows_memory)

    def _table(self, in_features: int, *part_sizes: int) -> LoraTable:
        placement, runtime = self._materials.placement, self._materials.runtime
        return runtime.lora.new_table(
            in_features,
            part_sizes,
            dtype=placement.dtype,
            device=placement.device,
            max_bytes=runtime.adapter_memory,
        )
