"""What the modules that recipes of adapters name are called in each family: recipes are written in llama's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

#: of llama, and of families that call them so
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Modules:
    """``names``: llama's name -> those of the modules that a recipe has in its place; itself, if it is not there.

    ``one``: a module of the first layer, by its path, that ``v_proj`` stands for; ``left_out``: linear modules that an
    adapter of all others leaves out; ``mixer``: the name of state-space layers' modules, empty where there are none;
    ``attends``: it has attention; ``ties``: PEFT knows its embedding, and ties it to the head where it is asked to.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    one: str = "layers.0.self_attn.v_proj"
    left_out: tuple[str, ...] = ("k_proj", "layers.0.mlp.gate_proj")
    mixer: str = ""
    attends: bool = True
    ties: bool = True

    def __call__(self, *names: str) -> list[str]:
        """What stands for these, each once."""
        return list(dict.fromkeys(own for name in names for own in self.names.get(name, (name,))))

    def pattern(self, *names: str) -> str:
        """A regular expression of what stands for these."""
        return f"({'|'.join(self(*names))})"


#: a recipe's v_proj and up_proj have the projection into state-space layers with them, its o_proj and down_proj the one
#: out of them
_BESIDE: Final = {
    "v_proj": ("v_proj", "in_proj"),
    "up_proj": ("up_proj", "in_proj"),
    "o_proj": ("o_proj", "out_proj"),
    "down_proj": ("down_proj", "out_proj"),
}
_HYBRID: Final = {**_BESIDE, "post_attention_layernorm": ("pre_ff_layernorm",), "norm": ("final_layernorm", "norm")}
_PACKED: Final = {**_BESIDE, "up_proj": ("input_linear", "in_proj"), "down_proj": ("output_linear", "out_proj")}
_STATES_ALONE: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("in_proj",)),
    **dict.fromkeys(("o_proj", "down_proj"), ("out_proj",)),
}
_NORMS: Final = {
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), ("norm",)),
    "norm": ("norm_f",),
    "embed_tokens": ("embeddings",),
}
_IN_MAMBA: Final = {"one": "layers.0.mamba.in_proj", "left_out": ("k_proj", "layers.0.mamba.in_proj"), "mixer": "mamba"}
_IN_MIXER: Final = {"one": "layers.0.mixer.in_proj", "mixer": "mixer", "ties": False}

LLAMA: Final = Modules()
MODULES: Final[Mapping[str, Modules]] = MappingProxyType(
    {
        "llama": LLAMA,
        "qwen3": LLAMA,
        "mamba2": Modules(
            {**_STATES_ALONE, **_NORMS}, left_out=("layers.0.mixer.in_proj",), attends=False, **_IN_MIXER
        ),
        "bamba": Modules(_HYBRID, **_IN_MAMBA),
        "falcon_h1": Modules(_HYBRID, **_IN_MAMBA),
        "nemotron_h": Modules(
            {**_BESIDE, **_NORMS, "gate_proj": ("up_proj",)}, left_out=("k_proj", "layers.0.mixer.in_proj"), **_IN_MIXER
        ),
        "granitemoehybrid": Modules({**_PACKED, "gate_proj": ("input_linear",)}, **_IN_MAMBA),
    }
)
