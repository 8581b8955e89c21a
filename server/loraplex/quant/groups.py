"""Integer codes in groups of inputs, each with a scale and an integer zero: what GPTQ and AWQ have in common.

::

    w = (code - zero) * scale

The product is exact in float32 for scales of 16 bits; it is then rounded to the type of the scales, because both
formats' libraries have their weights in it. Scales in float32 are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Grain, Matrix
from loraplex_kernels.quant.packing import pack, row_bytes
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import Values

#: -1: all inputs of a row share a scale
SIZES: Final = (-1, 32, 64, 128, 256, 512, 1024)
WORD_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Groups:
    """Codes of ``bits`` (4 or 8); ``size`` inputs share a scale, 0: all of them."""

    bits: int
    size: int

    @property
    def label(self) -> str:
        """For people: int4-g128."""
        return f"int{self.bits}-g{self.size}" if self.size else f"int{self.bits}-channel"

    @property
    def per_word(self) -> int:
        """How many codes an int32 holds."""
        return WORD_BITS // self.bits

    def count(self, matrix: Matrix) -> int:
        """How many groups a row has."""
        return -(-matrix.in_features // self.size) if self.size else 1

    def of(self, cols: slice) -> slice:
        """The groups of these inputs, which begin and end between two groups."""
        return slice(cols.start // self.size, cols.stop // self.size) if self.size else slice(0, 1)

    def grain(self) -> Grain:
        """Between any two groups; anywhere, where there is one alone."""
        return Grain(cols=self.size, why=f"group_size {self.size}") if self.size else Grain()

    def check(self, matrix: Matrix, name: str) -> None:
        """Raises UnsupportedFeature: the inputs are no whole groups."""
        if self.size and matrix.in_features % self.size:
            raise UnsupportedFeature(
                f"{matrix.name}: {matrix.in_features} inputs are no multiple of group_size {self.size} of {name}"
            )

    def check_words(self, matrix: Matrix, features: int, what: str, name: str) -> None:
        """Raises UnsupportedFeature: what is packed along these features ("inputs", "outputs") fills no whole words."""
        if features % self.per_word:
            raise UnsupportedFeature(
                f"{matrix.name}: {features} {what} are no multiple of the {self.per_word} of a word of {name}"
            )

    def nbytes(self, matrix: Matrix, *, zeros: bool) -> int:
        """Bytes in memory, with scales of 16 bits; ``zeros``: each group has its own."""
        scales = matrix.out_features * self.count(matrix)
        return matrix.out_features * row_bytes(matrix.in_features, self.bits) + scales * (3 if zeros else 2)

    def stored(
        self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None = None
    ) -> StoredMatrix:
        """Of uint8 codes ``[out, in]``, one a byte, and zeros and scales ``[groups, out]``, all copied.

        Where all zeros are the same (sym), that is the scheme's.
        """
        zero = int(zeros[0, 0])
        same = bool((zeros == zero).all())
        scheme = Scheme(
            Values.UINT4 if self.bits == 4 else Values.UINT8,
            self.size,
            zero=zero if same else 0,
            rounded=None if scales.dtype is torch.float32 else scales.dtype,
        )
        kept = PlainScales(_by_rows(scales), None if same else _by_rows(zeros))
        return StoredMatrix(scheme, (codes.shape[0], codes.shape[1]), pack(codes, self.bits), kept, order)


def read_groups(config: ConfigFields, bits: int, size: int, allowed: tuple[int, ...]) -> Groups:
    """The groups of a ``quantization_config`` that says ``bits`` and a group_size of ``size``.

    Raises UnsupportedFeature naming what is not one of ours, be it a key that says that not all matrices are alike.
    """
    method = config.text("quant_method")
    if bits not in allowed:
        raise UnsupportedFeature(
            f"quantization_config.bits {bits} of {method}; supported are {', '.join(map(str, allowed))}"
        )
    if size not in SIZES:
        raise UnsupportedFeature(
            f"quantization_config.group_size {size} of {method}; supported are {', '.join(map(str, SIZES))}"
        )
    pack_dtype = config.text("pack_dtype", "int32")
    if pack_dtype != "int32":
        raise UnsupportedFeature(f"quantization_config.pack_dtype {pack_dtype!r} of {method}; supported is int32")
    dynamic = config.section("dynamic")
    # "-:" leaves a module dense, which its tensors say as well
    other = [key for key in dynamic.keys() if not key.startswith("-:")] if dynamic else []  # noqa: SIM118
    if other:
        raise UnsupportedFeature(
            f"quantization_config.dynamic of {method} has {other[0]!r}; supported are modules left out, '-:'"
        )
    if config.has("rotation"):
        rotation = config.text("rotation")
        raise UnsupportedFeature(f"quantization_config.rotation {rotation!r} of {method}; supported is none")
    return Groups(bits, max(size, 0))


def covering(part: slice, per_word: int) -> tuple[slice, slice]:
    """The words that hold a part of what is packed along a dimension, and where it stands among their codes."""
    first, stop = part.start // per_word, -(-part.stop // per_word)
    return slice(first, stop), slice(part.start - first * per_word, part.stop - first * per_word)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[m, n]`` -> uint8 ``[m, n * 32 / bits]``: the codes of each word, from its low end up."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), 2).flatten(1)


def _by_rows(grid: torch.Tensor) -> torch.Tensor:
    """``[groups, out]`` -> ``[out, groups]``, its own memory."""
    return grid.T.clone(memory_format=torch.contiguous_format)
