"""Builds a decoder from a spec and a reader: decides what each rank holds of every tensor, and copies it out.

Each checkpoint tensor is read once, in checkpoint order, straight into the layer it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from loraplex.layers.attention import Attention, AttentionParts, Heads
from loraplex.layers.embedding import Changes, Embedding, Head
from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.mlp import ACTIVATIONS, GatedMLP
from loraplex.layers.norm import HeadNorm, RMSNorm
from loraplex.layers.rotary import Rotary
from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex.models.decoder import Decoder, DecoderLayer, DecoderParts
from loraplex.models.spec import EMBED, FINAL_NORM, HEAD, DecoderSpec, LinearShape, layer_name
from loraplex.parallel.group import TPGroup, solo
from loraplex.parallel.shard import Shard, even_slice, kv_head_slice, length, scaled
from loraplex.quant.base import Placement, QuantFormat, Slab, WeightReader
from loraplex.quant.dense import dense_weight, packs
from loraplex_kernels.attention import AttentionBackend
from loraplex_kernels.lora import LoraBackend, LoraTable


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a model is given by its server: op backends, the bytes each adapter table may grow to, its ranks."""

    lora: LoraBackend
    attention: AttentionBackend
    adapter_memory: int
    group: TPGroup = field(default_factory=solo)


@dataclass(frozen=True, slots=True)
class Materials:
    """What a decoder is built from."""

    spec: DecoderSpec
    reader: WeightReader
    format: QuantFormat
    placement: Placement
    runtime: Runtime


def assemble(materials: Materials) -> Decoder:
    """Read every tensor the spec names and return the model.

    Raises UnsupportedFeature when the group's size does not divide a dimension it cuts.
    """
    return _Assembly(materials).decoder()


class _Assembly:
    """One pass over the checkpoint; counts the bytes it keeps."""

    def __init__(self, materials: Materials) -> None:
        self._materials = materials
        self._spec = spec = materials.spec
        self._group = group = materials.runtime.group
        self._weight_bytes = 0
        self._rows_memory = RowsMemory(materials.runtime.lora.slots, materials.placement.device)
        self._kv_heads = kv_head_slice(spec.kv_heads, group)
        q_rows = scaled(even_slice(spec.heads, group, "num_attention_heads"), spec.head_dim)
        kv_rows = scaled(self._kv_heads, spec.head_dim)
        width = even_slice(spec.intermediate_size, group, "intermediate_size")
        self._heads = length(q_rows) // spec.head_dim
        #: module name below the layer -> the outputs (COLUMN) or inputs (ROW) that this rank holds
        self._share = {
            "self_attn.q_proj": q_rows,
            "self_attn.k_proj": kv_rows,
            "self_attn.v_proj": kv_rows,
            "self_attn.o_proj": q_rows,
            "mlp.gate_proj": width,
            "mlp.up_proj": width,
            "mlp.down_proj": width,
        }

    def decoder(self) -> Decoder:
        spec, placement = self._spec, self._materials.placement
        vocab = even_slice(spec.vocab_size, self._group, "vocab_size")
        embed = self._tensor(f"{EMBED}.weight", vocab)
        layers = tuple(self._layer(index) for index in range(spec.num_layers))
        norm = self._norm(FINAL_NORM)
        parts = DecoderParts(
            embedding=Embedding(EMBED, embed, self._embedding_changes(), vocab, self._group),
            layers=layers,
            norm=norm,
            head=self._head(embed, vocab),
            rotary=Rotary(spec.rotary, dtype=placement.dtype, device=placement.device),
            kv_heads=length(self._kv_heads),
            weight_bytes=self._weight_bytes,
            own_rows=self._rows_memory,
        )
        return Decoder(spec, placement, parts)

    def _head(self, embed: torch.Tensor, vocab: slice) -> Head:
        spec = self._spec
        if spec.tied:
            # lookups need rows, products the packed form: only where those differ is there a second copy
            weight = dense_weight(embed)
            self._weight_bytes += weight.nbytes if packs(self._materials.placement) else 0
        else:
            slab = Slab(f"{HEAD}.weight", vocab, slice(0, spec.hidden_size))
            weight = self._materials.format.load(self._materials.reader, (slab,), self._materials.placement)
            self._weight_bytes += weight.nbytes
        table = self._table(spec.hidden_size, length(vocab))
        rows = self._rows(RowsForm.MULTIPLIED, length(vocab), spec.hidden_size, grows=True)
        return Head(HEAD, weight, Changes(table, rows), self._group)

    def _layer(self, index: int) -> DecoderLayer:
        spec, name = self._spec, layer_name(index)
        shapes = {linear.name: linear for linear in spec.linears()}
        attention_norm = self._norm(f"{name}.input_layernorm")
        qkv_names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        qkv = self._linear(name, tuple(shapes[part] for part in qkv_names), Shard.COLUMN)
        o = self._linear(name, (shapes["self_attn.o_proj"],), Shard.ROW)
        heads = Heads(index, self._heads, length(self._kv_heads), spec.head_dim, spec.parts.windows[index])
        backend = self._materials.runtime.attention
        qk_norm = self._qk_norm(f"{name}.self_attn", heads)
        attention = Attention(heads, AttentionParts(qkv, qk_norm, o, backend))
        mlp_norm = self._norm(f"{name}.post_attention_layernorm")
        gate_up = self._linear(name, (shapes["mlp.gate_proj"], shapes["mlp.up_proj"]), Shard.COLUMN)
        down = self._linear(name, (shapes["mlp.down_proj"],), Shard.ROW)
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

    def _linear(self, layer: str, shapes: tuple[LinearShape, ...], shard: Shard) -> Linear:
        names = tuple(f"{layer}.{shape.name}" for shape in shapes)
        slabs = tuple(self._slab(f"{name}.weight", shape, shard) for name, shape in zip(names, shapes, strict=True))
        weight = self._materials.format.load(self._materials.reader, slabs, self._materials.placement)
        self._weight_bytes += weight.nbytes
        bias = None
        if shapes[0].bias and (shard is Shard.COLUMN or self._group.rank == 0):
            bias = torch.cat([self._tensor(f"{n}.bias", s.rows) for n, s in zip(names, slabs, strict=True)])
        table = self._table(length(slabs[0].cols), *(length(slab.rows) for slab in slabs))
        sizes = table.in_features, shapes[0].bias
        rows = tuple(self._rows(RowsForm.MULTIPLIED, size, *sizes) for size in table.part_sizes)
        return Linear(names, LinearParts(weight, bias, table, rows), shard, self._group)

    def _slab(self, key: str, shape: LinearShape, shard: Shard) -> Slab:
        share = self._share[shape.name]
        if shard is Shard.COLUMN:
            return Slab(key, share, slice(0, shape.in_features))
        return Slab(key, slice(0, shape.out_features), share)

    def _tensor(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        placement = self._materials.placement
        tensor = self._materials.reader.tensor(key, rows)
        kept = tensor.to(device=placement.device, dtype=placement.dtype, copy=True).contiguous()
        self._weight_bytes += kept.nbytes
        return kept

    def _embedding_changes(self) -> Changes:
        sizes = self._spec.vocab_size, self._spec.hidden_size
        return Changes(self._table(*sizes), self._rows(RowsForm.LOOKED_UP, *sizes, grows=True))

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
