"""AWQ, version gemm, as AutoAWQ and GPTQModel write it: 4 bits with a scale and a zero for each group of inputs.

A matrix lies on its side, packed into int32 words along the outputs. A word holds eight of them, from its low bits up
the outputs 0, 2, 4, 6, 1, 3, 5, 7::

    <name>.qweight   int32 [in, out / 8]
    <name>.qzeros    int32 [groups, out / 8]
    <name>.scales    float16 or bfloat16 [groups, out]

    w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]  g = i // group_size

Zeros are there with ``zero_point`` false as well: all are 8 then. Weights are those of AutoAWQ, in the type of the
stored scales (``groups.py``). Products are weight-only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex.quant.groups import Groups, covering, read_groups, unpack_words
from loraplex_kernels.quant.stored import StoredMatrix

BITS: Final = 4
VERSION: Final = "gemm"
#: where in a word each output stands
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
_FLOATS: Final = (torch.float16, torch.bfloat16)
_HEAD: Final = "lm_head"
#: a backend that says how the tensors lie; all others say what multiplies by them
_LLM_AWQ: Final = "llm-awq"


def read_config(config: ConfigFields) -> AwqFormat:
    """The format of a ``quantization_config`` of awq."""
    bits = "bits" if config.has("bits") else "w_bit"
    size = "group_size" if config.has("group_size") else "q_group_size"
    groups = read_groups(config, config.integer(bits, BITS), config.integer(size, 128, minimum=-1), (BITS,))
    version = config.text("version", config.text("format", VERSION)).lower()
    if config.text("backend", "auto") == _LLM_AWQ:
        version = _LLM_AWQ
    if version != VERSION:
        raise UnsupportedFeature(f"quantization_config.version {version!r} of awq; supported is {VERSION}")
    return AwqFormat(groups, config.flag("zero_point", True), config.flag("lm_head", False))


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """AWQ (``QuantFormat``). ``zero_point`` and ``lm_head``: what config.json says, for estimates alone."""

    groups: Groups
    zero_point: bool
    lm_head: bool

    @property
    def name(self) -> str:
        return f"awq-{self.groups.label}"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        # either is enough: what else is missing is then named
        return f"{matrix.name}.qweight" in keys or f"{matrix.name}.qzeros" in keys

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        groups, words = self.groups.count(matrix), -(-matrix.out_features // self.groups.per_word)
        return {
            f"{matrix.name}.qweight": Expected((matrix.in_features, words), (torch.int32,)),
            f"{matrix.name}.qzeros": Expected((groups, words), (torch.int32,)),
            f"{matrix.name}.scales": Expected((groups, matrix.out_features), _FLOATS),
        }

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        self.groups.check(matrix, self.name)
        self.groups.check_words(matrix, matrix.out_features, "outputs", self.name)

    def grain(self, matrix: Matrix) -> Grain:
        return self.groups.grain()

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.end and not (self.lm_head and matrix.name == _HEAD):
            return None
        return self.groups.nbytes(matrix, zeros=self.zero_point)

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        name, groups = slab.matrix.name, self.groups.of(slab.cols)
        words, within = covering(slab.rows, self.groups.per_word)
        codes = _unpack(reader.tensor(f"{name}.qweight", slab.cols, words))[:, within]
        zeros = _unpack(reader.tensor(f"{name}.qzeros", groups, words))[:, within]
        scales = reader.tensor(f"{name}.scales", groups, slab.rows)
        return self.groups.stored(codes.T.contiguous(), zeros, scales)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[m, n]`` -> uint8 ``[m, n * 8]``, in the order of the outputs."""
    fields = unpack_words(words, BITS).view(words.shape[0], -1, len(_PLACES))
    return fields[:, :, list(_PLACES)].flatten(1)
