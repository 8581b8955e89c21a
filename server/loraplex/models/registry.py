"""Which family file answers for which architecture: one line each. Reads config.json's values, never weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models import bamba, falcon_h1, granitemoehybrid, llama, mamba2, mistral, nemotron_h, qwen2, qwen3
from loraplex.models.sites import Site
from loraplex.models.spec import DecoderSpec

_FAMILIES: Final[Mapping[str, Callable[[ConfigFields], DecoderSpec]]] = MappingProxyType(
    {
        "BambaForCausalLM": bamba.spec,
        "FalconH1ForCausalLM": falcon_h1.spec,
        "GraniteMoeHybridForCausalLM": granitemoehybrid.spec,
        "LlamaForCausalLM": llama.spec,
        "Mamba2ForCausalLM": mamba2.spec,
        "MistralForCausalLM": mistral.spec,
        "NemotronHForCausalLM": nemotron_h.spec,
        "Qwen2ForCausalLM": qwen2.spec,
        "Qwen3ForCausalLM": qwen3.spec,
    }
)
#: for configs that carry a model_type but no architectures
_MODEL_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bamba": "BambaForCausalLM",
        "falcon_h1": "FalconH1ForCausalLM",
        "granitemoehybrid": "GraniteMoeHybridForCausalLM",
        "llama": "LlamaForCausalLM",
        "mamba2": "Mamba2ForCausalLM",
        "mistral": "MistralForCausalLM",
        "nemotron_h": "NemotronHForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)


def read_spec(config: Mapping[str, object]) -> DecoderSpec:
    """The decoder that a config.json describes.

    Raises UnsupportedFeature naming the architecture and those we have, InvalidModel for wrong or missing values.
    """
    fields = ConfigFields(config)
    named = fields.texts("architectures")
    # state-spaces' own configs say neither
    model_type = fields.text("model_type", "mamba2" if fields.has("ssm_cfg") else "")
    architecture = named[0] if named else _MODEL_TYPES.get(model_type, model_type)
    family = _FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedFeature(
            f"architecture {architecture!r} (config.json: architectures, model_type); "
            f"supported are {', '.join(_FAMILIES)}"
        )
    return family(fields)


def describe(config: Mapping[str, object]) -> tuple[Site, ...]:
    """Every adaptable module of the model that a config.json describes, in checkpoint order."""
    return read_spec(config).sites()
