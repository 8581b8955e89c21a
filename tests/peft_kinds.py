"""Adapters of every kind that Loraplex serves, made by PEFT itself, with random values in everything it trains.

Each recipe is a PEFT config and what else it takes; ``make`` writes the directory that ``save_pretrained`` writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import BdLoraConfig
from transformers import PreTrainedModel

from tests.kind_modules import LINEARS, LLAMA, Modules
from tests.oracle import fresh, on_every_module
from tests.tiny import VOCAB_SIZE

#: what aLoRA adapters of these recipes are woken by
INVOCATION: Final = (11, 7, 19)
#: tokens whose rows are trained; the last is in no prompt that does not ask for it
TRAINED_TOKENS: Final = (5, 17, 40, 95)
#: tokens that recipes with an added vocabulary know
WIDE_VOCAB: Final = VOCAB_SIZE + 5


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: ``config`` makes its PEFT config, fresh each time.

    ``vocab_size``: what the base's is resized to before; 0: left as it is. ``tied``: on which bases it can be made,
    None: on both. ``train``: what happens between making it and saving it, beside the random values. ``converted``: it
    is trained on a changed base, and saved as a plain LoRA of the unchanged one. ``factors``: how many matrices are
    multiplied, so that a random step of ``strength`` in each changes the product by its power.
    """

    config: Callable[[], PeftConfig]
    vocab_size: int = 0
    tied: bool | None = None
    train: Callable[[PeftModel], None] = lambda model: None
    converted: bool = False
    strength: float = 0.3
    factors: int = 2

    def softened(self, share: float) -> Recipe:
        """The same with about ``share`` of its effect."""
        return replace(self, strength=self.strength * share ** (1 / self.factors))

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        with warnings.catch_warnings():
            _ignore_advice()
            return tuple(getattr(self.config(), "alora_invocation_tokens", None) or ())


def _lora(modules: Modules, *names: str, **config: Any) -> Callable[[], PeftConfig]:
    """``names``: what it is put on, in llama's names; none: on every linear module."""
    targets = {"target_modules": modules(*(names or LINEARS))}
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **targets, **config})


def _allocate(model: PeftModel) -> None:
    """Let AdaLoRA give its ranks away as it does at the end of a training."""
    ids = torch.arange(3, 19).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    for step in (0, 2):
        model.base_model.update_and_allocate(step)


def _loras(m: Modules) -> dict[str, Recipe]:
    blocks = {
        "target_modules_bd_a": m("o_proj", "down_proj"),
        "target_modules_bd_b": m("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        "nblocks": 2,
    }
    pattern = rf".*layers\.1\..*{m.pattern('q_proj', 'down_proj')}|.*\.0\..*{m.pattern('up_proj')}"
    ranks = {m("q_proj")[0]: 1, rf"layers\.1\..*{m.pattern('gate_proj', 'up_proj', 'down_proj')}": 9}
    return {
        "lora": Recipe(_lora(m)),
        "lora-pattern": Recipe(_lora(m, target_modules=pattern)),
        "lora-all-linear": Recipe(_lora(m, target_modules="all-linear", exclude_modules=list(m.left_out))),
        "lora-layers": Recipe(_lora(m, layers_to_transform=[1], layers_pattern="layers")),
        "lora-ranks": Recipe(_lora(m, rank_pattern=ranks, alpha_pattern={m.one: 3})),
        "lora-lora-bias": Recipe(_lora(m, lora_bias=True)),
        "lora-bias-all": Recipe(_lora(m, "q_proj", "up_proj", bias="all")),
        "lora-bias-only": Recipe(_lora(m, "v_proj", "down_proj", bias="lora_only")),
        "lora-ends": Recipe(_lora(m, "embed_tokens", "lm_head", "gate_proj")),
        "rslora": Recipe(_lora(m, r=6, lora_alpha=3, use_rslora=True, rank_pattern={m("o_proj")[-1]: 2})),
        "dora": Recipe(_lora(m, use_dora=True)),
        "dora-ends": Recipe(_lora(m, "embed_tokens", "lm_head", "v_proj", use_dora=True)),
        "dora-rslora": Recipe(_lora(m, "k_proj", "down_proj", use_dora=True, use_rslora=True)),
        "bdlora": Recipe(_lora(m, use_bdlora=BdLoraConfig(**blocks))),
        "alora": Recipe(_lora(m, alora_invocation_tokens=list(INVOCATION))),
        "alora-other": Recipe(_lora(m, "q_proj", "o_proj", alora_invocation_tokens=list(INVOCATION), r=2)),
        "pissa-converted": Recipe(_lora(m, init_lora_weights="pissa"), converted=True),
        "olora-converted": Recipe(_lora(m, init_lora_weights="olora"), converted=True),
    }


def _adaloras(m: Modules) -> dict[str, Recipe]:
    whole, allocated = m(*LINEARS), m("q_proj", "down_proj")
    return {
        "adalora": Recipe(
            lambda: AdaLoraConfig(init_r=5, lora_alpha=3, total_step=10, target_modules=whole), strength=0.5, factors=3
        ),
        "adalora-allocated": Recipe(
            lambda: AdaLoraConfig(init_r=6, target_r=3, lora_alpha=3, total_step=2, target_modules=allocated),
            train=_allocate,
            strength=0.8,
            factors=3,
        ),
    }


def _others(m: Modules) -> dict[str, Recipe]:
    whole = m(*LINEARS)
    return {
        **_adaloras(m),
        "vera": Recipe(lambda: VeraConfig(r=16, target_modules=whole), strength=0.8),
        "vera-regenerated": Recipe(
            lambda: VeraConfig(r=8, target_modules=m("q_proj", "o_proj"), save_projection=False, projection_prng_key=5),
            strength=0.8,
        ),
        "loha": Recipe(lambda: LoHaConfig(r=3, alpha=6, target_modules=whole), strength=0.5, factors=4),
        "lokr": Recipe(
            lambda: LoKrConfig(r=2, alpha=4, target_modules=m("q_proj", "up_proj", "down_proj")), strength=0.5
        ),
        "lokr-both": Recipe(
            lambda: LoKrConfig(
                r=1, alpha=1, decompose_both=True, decompose_factor=4, target_modules=m("v_proj", "o_proj")
            ),
            strength=0.8,
        ),
        "ia3": Recipe(
            lambda: IA3Config(
                target_modules=m("q_proj", "k_proj", "v_proj", "down_proj"), feedforward_modules=m("down_proj")
            ),
            strength=0.5,
        ),
        "ia3-up": Recipe(
            lambda: IA3Config(
                target_modules=m("o_proj", "up_proj", "lm_head"),
                feedforward_modules=m("up_proj"),
                modules_to_save=m("norm"),
            ),
            strength=0.5,
        ),
        "ln-tuning": Recipe(
            lambda: LNTuningConfig(target_modules=m("input_layernorm", "post_attention_layernorm", "norm"))
        ),
    }


def _saved(m: Modules) -> dict[str, Recipe]:
    ends = m("embed_tokens", "lm_head")
    added = list(range(VOCAB_SIZE, WIDE_VOCAB))
    made = {
        "trainable-tokens": Recipe(lambda: TrainableTokensConfig(token_indices=list(TRAINED_TOKENS))),
        "lora-tokens": Recipe(_lora(m, "q_proj", trainable_token_indices=list(TRAINED_TOKENS))),
        "lora-saved-norm": Recipe(_lora(m, "v_proj", modules_to_save=m("input_layernorm", "norm"))),
        "lora-saved-head": Recipe(_lora(m, "v_proj", modules_to_save=["lm_head"]), tied=False),
        "lora-saved-embedding": Recipe(_lora(m, "v_proj", modules_to_save=m("embed_tokens")), tied=False),
        "lora-saved-linear": Recipe(_lora(m, "v_proj", modules_to_save=m("down_proj", "q_proj"))),
        "lora-saved-twin": Recipe(_lora(m, "v_proj", modules_to_save=["lm_head", *m("norm")]), tied=False),
        "lora-added-vocabulary": Recipe(_lora(m, "v_proj", modules_to_save=ends), vocab_size=WIDE_VOCAB, tied=False),
        "lora-added-tokens": Recipe(_lora(m, "v_proj", trainable_token_indices=added), vocab_size=WIDE_VOCAB),
        "lora-resized": Recipe(_lora(m, "v_proj", "up_proj"), vocab_size=WIDE_VOCAB),
        "lora-tied-saved": Recipe(
            _lora(m, "v_proj", modules_to_save=m("embed_tokens"), ensure_weight_tying=True), tied=True
        ),
        "lora-tied-ends": Recipe(_lora(m, "embed_tokens", "v_proj", ensure_weight_tying=True), tied=True),
    }
    if not m.attends:
        del made["lora-saved-linear"]  # nothing would be left to be adapted
    if not m.ties:
        del made["lora-tied-saved"], made["lora-tied-ends"]
    return made


def _states(m: Modules) -> dict[str, Recipe]:
    """Of what state-space layers have beside linear modules."""
    return {
        "lora-saved-convolution": Recipe(_lora(m, "v_proj", modules_to_save=["conv1d"])),
        "lora-saved-gated-norm": Recipe(_lora(m, "v_proj", modules_to_save=[f"{m.mixer}.norm"])),
        # with A_log, D and dt_bias in it
        "lora-saved-mixer": Recipe(_lora(m, "v_proj", "lm_head", modules_to_save=[f"layers.0.{m.mixer}"])),
    }


def recipes_of(modules: Modules) -> Mapping[str, Recipe]:
    """Every recipe, over a family's modules."""
    states = _states(modules) if modules.mixer else {}
    return MappingProxyType({**_loras(modules), **_others(modules), **_saved(modules), **states})


RECIPES: Final = recipes_of(LLAMA)
#: of every kind one, of plain LoRA and of what is saved some
SOME_OF_ALL: Final = (
    "lora",
    "lora-ranks",
    "lora-lora-bias",
    "lora-bias-all",
    "lora-ends",
    "rslora",
    "dora",
    "bdlora",
    "alora",
    "adalora",
    "vera",
    "loha",
    "lokr",
    "ia3-up",
    "ln-tuning",
    "trainable-tokens",
    "lora-saved-head",
    "lora-saved-convolution",
    "lora-saved-gated-norm",
    "lora-saved-mixer",
    "lora-added-tokens",
    "lora-tied-saved",
    "lora-tied-ends",
)


def recipes(tied: bool, among: Mapping[str, Recipe] = RECIPES) -> tuple[str, ...]:
    """Names of the recipes that can be made on a base whose head is tied, or not."""
    return tuple(name for name, recipe in among.items() if recipe.tied in (None, tied))


def fresh_base(base_dir: Path, vocab_size: int = 0) -> PreTrainedModel:
    """The checkpoint in transformers, float32, its vocabulary resized where ``vocab_size`` is not 0."""
    base: PreTrainedModel = fresh(base_dir)
    if vocab_size:
        torch.manual_seed(vocab_size)
        base.resize_token_embeddings(vocab_size, mean_resizing=False)
    return base


def save(recipe: Recipe, base_dir: Path, out_dir: Path, *, seed: int = 0) -> Path:
    """Make an adapter with PEFT, let everything it trains move by a random step, and save it with PEFT."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(), on_every_module():
        _ignore_advice()
        model = get_peft_model(fresh_base(base_dir, recipe.vocab_size), recipe.config())
        initial = out_dir.with_name("initial")  # PEFT makes a module of this name: no dots
        if recipe.converted:
            # the conversion reads it as a plain LoRA
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(str(initial))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * recipe.strength)
        recipe.train(model)
        further = {"path_initial_model_for_weight_conversion": str(initial)} if recipe.converted else {}
        with patch.object(PeftModel, "create_or_update_model_card"):  # which takes longer than all else
            model.save_pretrained(str(out_dir), **further)
    return out_dir


def _ignore_advice() -> None:
    """What PEFT advises of on the way; the adapters are meant as they are."""
    for message in (
        "Setting `save_embedding_layers`",  # it saves a targeted or resized embedding, and says so
        "Specified to not (save|load) vera_A",
        "`lora_bias=True` was passed",
        "Adapter 'default': .* LoRA tensor.s. have invalid shape",  # it takes biases for matrices
        "Unsupported layer type",
        "Model has `tie_word_embeddings=True`",
    ):
        warnings.filterwarnings("ignore", message=message)
