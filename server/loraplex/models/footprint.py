"""How much memory a model takes at the least, from its spec alone: no weight is read for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import Placement, QuantFormat
from loraplex.quant.dense import packs


@dataclass(frozen=True, slots=True)
class Share:
    """A part of what is needed, by a name for people."""

    what: str
    nbytes: int


def weight_shares(
    spec: DecoderSpec, placement: Placement, quant_format: QuantFormat, parts: int = 1
) -> tuple[Share, ...]:
    """Bytes of all weights as the format keeps them, dense ones in the placement's dtype, or of one of ``parts`` equal
    parts of them. Packed forms may be padded, and norms are in each part whole, so it can be a little more."""
    sizes = {key: prod(shape) * placement.dtype.itemsize for key, shape in spec.tensors().items()}
    quantized = {
        matrix.key: nbytes for matrix in spec.matrices().values() if (nbytes := quant_format.nbytes(matrix)) is not None
    }
    sizes.update(quantized)
    embed, embedding = f"{spec.names.embed}.weight", sizes.pop(f"{spec.names.embed}.weight")
    # a tied head multiplies by the embedding itself, or by a packed copy of it
    copied = packs(placement) and embed not in quantized
    head = sizes.pop(f"{spec.names.head}.weight", embedding if copied else 0)
    shares = (
        Share("embedding", embedding // parts),
        Share(f"{spec.num_layers} layers", sum(sizes.values()) // parts),
        Share("head", head // parts),
    )
    return tuple(share for share in shares if share.nbytes)
