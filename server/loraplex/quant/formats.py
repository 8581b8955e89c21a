"""Which weight formats there are. The next one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant import at_load, awq, bnb4, bnb8, compressed_tensors, fp8, gguf, gptq
from loraplex.quant.base import QuantFormat
from loraplex.quant.dense import DenseFormat
from loraplex.quant.dequantized import DequantizedFormat

NONE: Final = "none"

ReadConfig = Callable[[ConfigFields], QuantFormat | None]
"""quantization_config -> the format, where it is this one. Raises InvalidModel or UnsupportedFeature naming the key."""

#: quant_method of config.json, and what may know it; the first that answers has it
CHECKPOINT_FORMATS: Final[tuple[tuple[str, ReadConfig], ...]] = (
    ("bitsandbytes", bnb4.read_config),
    ("bitsandbytes", bnb8.read_config),
    ("fp8", fp8.read_config),
    ("fbgemm_fp8", fp8.read_config),
    ("compressed-tensors", compressed_tensors.read_config),
    ("gptq", gptq.read_config),
    ("awq", awq.read_config),
    (gguf.METHOD, gguf.read_config),
)
#: what --quantization makes of a dense checkpoint
LOAD_FORMATS: Final[Mapping[str, Callable[[], QuantFormat]]] = MappingProxyType(
    {"nf4": at_load.nf4, "fp4": at_load.fp4, "int8": at_load.int8, "fp8": at_load.fp8}
)


def choose_format(asked: str, config: ConfigFields) -> QuantFormat:
    """The format of a checkpoint with this config.json; ``asked`` is what to quantize a dense one to, if anything, or
    "none": to serve it dense, whatever it is stored in.

    Raises UnsupportedFeature naming what is not one of ours, or both formats where one would be put on another.
    """
    section = config.section("quantization_config")
    if asked not in ("", NONE, *LOAD_FORMATS):
        raise UnsupportedFeature(
            f"quantization {asked!r}; allowed are {', '.join((NONE, *LOAD_FORMATS))}", field="quantization"
        )
    if section is None:
        return LOAD_FORMATS[asked]() if asked in LOAD_FORMATS else DenseFormat()
    stored = _stored_format(section)
    if asked in LOAD_FORMATS:
        raise UnsupportedFeature(
            f"quantization {asked!r}, but the checkpoint is quantized already, as {stored.name}: leave --quantization "
            f"out to serve it as it is, or say {NONE} to serve it dense",
            field="quantization",
        )
    return DequantizedFormat(stored) if asked == NONE else stored


def _stored_format(section: ConfigFields) -> QuantFormat:
    method = section.text("quant_method", "")
    for name, read in CHECKPOINT_FORMATS:
        if name == method and (found := read(section)) is not None:
            return found
    known = ", ".join(dict.fromkeys(name for name, _ in CHECKPOINT_FORMATS))
    raise UnsupportedFeature(f"quantization_config.quant_method {method!r}; supported are {known}")
