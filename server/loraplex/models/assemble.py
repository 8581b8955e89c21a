"""Builds a decoder from a spec and a reader: both ends, and the layers as their mixers say."""

from __future__ import annotations

from loraplex.layers.rotary import Rotary
from loraplex.models.decoder import Decoder, DecoderBlock, DecoderLayer, DecoderParts
from loraplex.models.mixers.base import HeldSmall
from loraplex.models.spec import BlockSpec, DecoderSpec
from loraplex.models.workbench import Materials, Runtime, Workbench

__all__ = ["Materials", "Runtime", "assemble"]


def assemble(materials: Materials) -> Decoder:
    """Read every tensor the spec names and return the model.

    Raises UnsupportedFeature when the group's size does not divide a dimension it cuts.
    """
    spec, placement, bench = materials.spec, materials.placement, Workbench(materials)
    embedding, matrix = bench.embedding(spec.names.embed)
    layers = tuple(_layer(spec, index, bench) for index in range(spec.num_layers))
    norm = bench.norm(spec.names.norm, spec.norm_eps)
    head = bench.head(spec.names.head, matrix if spec.tied else None)
    rotary = None if spec.rotary is None else Rotary(spec.rotary, dtype=placement.dtype, device=placement.device)
    parts = DecoderParts(
        embedding=embedding,
        layers=layers,
        norm=norm,
        head=head,
        rotary=rotary,
        weight_bytes=bench.weight_bytes,
        own_rows=bench.rows_memory,
        num_ranks=bench.group.size,
    )
    return Decoder(spec, placement, parts)


def _layer(spec: DecoderSpec, index: int, bench: Workbench) -> DecoderLayer:
    return DecoderLayer(tuple(_block(spec, block, spec.layer_name(index), bench) for block in spec.layers[index]))


def _block(spec: DecoderSpec, block: BlockSpec, layer: str, bench: Workbench) -> DecoderBlock:
    norm = bench.norm(f"{layer}.{block.norm}", spec.norm_eps)
    built = [mixer.build(bench, layer) for mixer in block.mixers]
    held = (HeldSmall(norm), *(one for mixer in built for one in mixer.held))
    return DecoderBlock(norm, tuple(mixer.run for mixer in built), block.scale, held)
