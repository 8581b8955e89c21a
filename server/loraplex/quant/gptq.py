"""GPTQ, as AutoGPTQ, GPTQModel and optimum write it: 4 and 8 bits, symmetric or not, with or without desc_act.

A matrix is integers packed into int32 words along one dimension, the first in a word's low bits::

    <name>.qweight   int32 [in * bits / 32, out]       codes, packed along the inputs
    <name>.qzeros    int32 [groups, out * bits / 32]   zeros, packed along the outputs
    <name>.scales    float16, bfloat16 or float32 [groups, out]
    <name>.g_idx     int32 [in]                        the group of each input; i // group_size where it is missing

    w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]  g = g_idx[i]

``checkpoint_format`` gptq has words of zeros less 1 in every field, and the subtraction borrows from field to field
where a zero is 0. As in GPTQModel the same constant is added to the word, which undoes that whatever the zeros are.

With ``desc_act`` inputs were sorted before they were grouped: codes are kept in the order of their groups, and the
matrix cannot be cut by inputs. Weights are those of GPTQModel's torch kernel, in the type of the stored scales
(``groups.py``). Activations are never quantized: products are weight-only, also where an ``activation`` is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.parallel.shard import length
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex.quant.groups import Groups, covering, read_groups, unpack_words
from loraplex_kernels.quant.stored import StoredMatrix

BITS: Final = (4, 8)
FORMATS: Final = ("gptq", "gptq_v2")
#: 1 in every field of a word, by bits
_ONES: Final = {4: 0x11111111, 8: 0x01010101}
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
_HEAD: Final = "lm_head"


def read_config(config: ConfigFields) -> GptqFormat:
    """The format of a ``quantization_config`` of gptq."""
    groups = read_groups(config, config.integer("bits"), config.integer("group_size", 128, minimum=-1), BITS)
    layout = config.text("checkpoint_format", config.text("format", FORMATS[0])).lower()
    if layout not in FORMATS:
        raise UnsupportedFeature(
            f"quantization_config.checkpoint_format {layout!r} of gptq; supported are {', '.join(FORMATS)}"
        )
    if config.flag("is_marlin_format", False):
        raise UnsupportedFeature(
            f"quantization_config.is_marlin_format true of gptq; supported are the formats {', '.join(FORMATS)}"
        )
    return GptqFormat(
        groups,
        less_one=layout == FORMATS[0],
        desc_act=config.flag("desc_act", False),
        sym=config.flag("sym", True),
        lm_head=config.flag("lm_head", False),
    )


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """GPTQ (``QuantFormat``). ``less_one``: zeros are stored so; ``sym`` and ``lm_head`` are for estimates alone."""

    groups: Groups
    less_one: bool
    desc_act: bool
    sym: bool
    lm_head: bool

    @property
    def name(self) -> str:
        return f"gptq-{self.groups.label}"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        # either is enough: what else is missing is then named
        return f"{matrix.name}.qweight" in keys or f"{matrix.name}.qzeros" in keys

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        name, per_word = matrix.name, self.groups.per_word
        outputs, inputs, groups = matrix.out_features, matrix.in_features, self.groups.count(matrix)
        words = (torch.int32,)
        expected = {
            f"{name}.qweight": Expected((-(-inputs // per_word), outputs), words),
            f"{name}.qzeros": Expected((groups, -(-outputs // per_word)), words),
            f"{name}.scales": Expected((groups, outputs), _FLOATS),
        }
        if self._sorted or f"{name}.g_idx" in keys:
            expected[f"{name}.g_idx"] = Expected((inputs,), words, required=self._sorted)
        if not matrix.bias and f"{name}.bias" in keys:
            # early AutoGPTQ wrote one for every module
            expected[f"{name}.bias"] = Expected((outputs,), required=False)
        return expected

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        self.groups.check(matrix, self.name)
        self.groups.check_words(matrix, matrix.in_features, "inputs", self.name)
        self.groups.check_words(matrix, matrix.out_features, "outputs", self.name)
        bias, keys = f"{matrix.name}.bias", reader.keys()
        if not matrix.bias and bias in keys and bool(reader.tensor(bias).any()):
            raise UnsupportedFeature(f"tensor {bias!r} is not zero, and the model has no bias there")
        self._order(matrix, reader)

    def grain(self, matrix: Matrix) -> Grain:
        return Grain(cols=matrix.in_features, why="desc_act") if self._sorted else self.groups.grain()

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.end and not (self.lm_head and matrix.name == _HEAD):
            return None
        order = 8 * matrix.in_features if self._sorted else 0
        return self.groups.nbytes(matrix, zeros=not self.sym) + order

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        name, per_word, bits = slab.matrix.name, self.groups.per_word, self.groups.bits
        words, within = covering(slab.cols, per_word)
        codes = unpack_words(reader.tensor(f"{name}.qweight", words, slab.rows).T, bits)[:, within]
        groups = self.groups.of(slab.cols)
        words, within = covering(slab.rows, per_word)
        packed = reader.tensor(f"{name}.qzeros", groups, words)
        zeros = unpack_words(packed + _ONES[bits] if self.less_one else packed, bits)[:, within]
        order = self._order(slab.matrix, reader)
        if order is not None:
            assert length(slab.cols) == slab.matrix.in_features, "grain() allows no cut by inputs"
            codes = codes[:, order]
        scales = reader.tensor(f"{name}.scales", groups, slab.rows)
        return self.groups.stored(codes.contiguous(), zeros, scales, order)

    @property
    def _sorted(self) -> bool:
        """Whether inputs of a group may stand apart; all are in one where a row has no other."""
        return self.desc_act and self.groups.size > 0

    def _order(self, matrix: Matrix, reader: WeightReader) -> torch.Tensor | None:
        """int64 ``[in]``, the inputs in the order of their groups; None where they stand so.

        Raises InvalidModel or UnsupportedFeature naming g_idx.
        """
        key, keys = f"{matrix.name}.g_idx", reader.keys()
        if key not in keys:
            return None
        groups, size = self.groups.count(matrix), self.groups.size or matrix.in_features
        g_idx = reader.tensor(key).long()
        if torch.equal(g_idx, torch.arange(matrix.in_features) // size):
            return None
        wrong = g_idx[(g_idx < 0) | (g_idx >= groups)]
        if len(wrong):
            raise InvalidModel(f"tensor {key!r} has group {int(wrong[0])}, allowed are 0 to {groups - 1}")
        if not self.desc_act:
            raise InvalidModel(f"tensor {key!r} is not i // {size}, which it must be as desc_act is false")
        held = torch.bincount(g_idx, minlength=groups)
        uneven = torch.nonzero(held != size)
        if len(uneven):
            group = int(uneven[0])
            raise UnsupportedFeature(
                f"tensor {key!r} has {int(held[group])} inputs in group {group}, supported is group_size {size} in each"
            )
        return torch.argsort(g_idx, stable=True)
