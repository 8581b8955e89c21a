"""What the codes of quantized matrices stand for."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


class Values(enum.Enum):
    """A kind of code: how many bits it takes, and which number it is."""

    NF4 = "nf4"
    FP4 = "fp4"
    UINT4 = "uint4"
    UINT6 = "uint6"
    UINT8 = "uint8"
    INT8 = "int8"
    E4M3 = "e4m3"

    @property
    def bits(self) -> int:
        return {Values.NF4: 4, Values.FP4: 4, Values.UINT4: 4, Values.UINT6: 6}.get(self, 8)


#: the numbers of codes that have a table, as bitsandbytes stores them (create_normal_map; create_fp8_map for 4 bits)
TABLES: Final[Mapping[Values, tuple[float, ...]]] = MappingProxyType(
    {
        Values.NF4: (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        Values.FP4: (
            0.0,
            0.005208333333333333,
            0.6666666666666666,
            1.0,
            0.3333333333333333,
            0.5,
            0.16666666666666666,
            0.25,
            0.0,
            -0.005208333333333333,
            -0.6666666666666666,
            -1.0,
            -0.3333333333333333,
            -0.5,
            -0.16666666666666666,
            -0.25,
        ),
    }
)
