"""Train the demo adapters: `python -m loraplex.demo.train --base DIR --out DIR [--only NAME]`.

Plain LoRA through PEFT on the examples of `data.py`, with the recipes of `recipe.py`: the base stays in bfloat16
and frozen, the adapter trains in float32 and is saved in bfloat16, and the loss counts the answer's tokens only.
Seeded; another machine or thread count rounds differently, and so trains a slightly different adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loraplex.demo.data import Example, training_examples
from loraplex.demo.recipe import BASE_MODEL_NAME, RECIPES, Recipe

_IGNORED = -100
_WARMUP_STEPS = 10
# Lengths are padded to these multiples: a CPU matmul builds new code for every new shape, for seconds at a time.
_LENGTH_MULTIPLE = 32
_ANSWER_TOKENS_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded token ids and, where the answer is, the same ids as labels; elsewhere -100. All [N, L]."""

    token_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def train_adapter(base_dir: Path, adapter: str, out_dir: Path, seed: int = 0) -> float:
    """Train `adapter` on the checkpoint in `base_dir`, save it under `out_dir / adapter`, return the last loss."""
    recipe = RECIPES[adapter]
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    model = get_peft_model(base, recipe.lora_config())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, recipe.num_steps))
    batches = _batches(tokenizer, training_examples(adapter, seed), recipe, random.Random(seed))
    start_s = time.monotonic()
    mean_loss = 0.0
    for step, batch in zip(range(recipe.num_steps), batches, strict=False):
        loss = _answer_loss(model, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean_loss = loss.item() if step == 0 else 0.9 * mean_loss + 0.1 * loss.item()
        if step % 10 == 9:
            print(f"{adapter} step {step + 1}: loss {mean_loss:.3f}, {time.monotonic() - start_s:.0f} s", flush=True)
    _save(model, out_dir / adapter)
    return mean_loss


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Return the token ids of the chat up to the answer, and those of the answer with its end-of-turn token."""
    messages = [{"role": "user", "content": example.prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    answer_ids: list[int] = tokenizer(example.answer, add_special_tokens=False).input_ids
    return prompt_ids, [*answer_ids, tokenizer.eos_token_id]


def _batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe, rng: random.Random
) -> Iterator[TokenBatch]:
    """Yield batches for ever, reshuffled every pass; examples of like length share a batch, to pad little."""
    encoded = [encode(tokenizer, example) for example in examples]
    pool_size = 8 * recipe.batch_size
    while True:
        rng.shuffle(encoded)
        for start in range(0, len(encoded) - recipe.batch_size + 1, pool_size):
            pool = sorted(encoded[start : start + pool_size], key=lambda pair: len(pair[0]) + len(pair[1]))
            groups = [pool[i : i + recipe.batch_size] for i in range(0, len(pool), recipe.batch_size)]
            rng.shuffle(groups)
            yield from (_pad(group, tokenizer.eos_token_id) for group in groups)


def _pad(group: Sequence[tuple[list[int], list[int]]], padding_id: int) -> TokenBatch:
    length = _round_up(max(len(prompt) + len(answer) for prompt, answer in group), _LENGTH_MULTIPLE)
    token_ids = torch.full((len(group), length), padding_id)  # [N, L]
    labels = torch.full((len(group), length), _IGNORED)  # [N, L]
    mask = torch.zeros((len(group), length), dtype=torch.long)  # [N, L]
    for row, (prompt, answer) in enumerate(group):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return TokenBatch(token_ids, mask, labels)


def _answer_loss(model: PeftModel, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of the answer tokens; logits are computed for their positions only."""
    causal_lm = model.get_base_model()
    targets = batch.labels[:, 1:].flatten()  # [N * (L-1)]
    positions = (targets != _IGNORED).nonzero().flatten()  # [T]
    padding = _round_up(len(positions), _ANSWER_TOKENS_MULTIPLE) - len(positions)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = causal_lm.model(batch.token_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        answer_hidden = hidden[:, :-1].flatten(0, 1)[positions]  # [T, H]
        logits = causal_lm.lm_head(nn.functional.pad(answer_hidden, (0, 0, 0, padding)))  # [T + padding, V]
    labels = nn.functional.pad(targets[positions], (0, padding), value=_IGNORED)
    return nn.functional.cross_entropy(logits.float(), labels, ignore_index=_IGNORED)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _warmup_then_cosine(step: int, num_steps: int) -> float:
    if step < _WARMUP_STEPS:
        return (step + 1) / _WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - _WARMUP_STEPS) / max(1, num_steps - _WARMUP_STEPS)))


def _save(model: PeftModel, adapter_dir: Path) -> None:
    """Write what PEFT writes, with bfloat16 weights, the base's public name, and without the template README."""
    model.save_pretrained(adapter_dir, save_embedding_layers=False)
    (adapter_dir / "README.md").unlink(missing_ok=True)
    weights_path = adapter_dir / "adapter_model.safetensors"
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in load_file(weights_path).items()}
    save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)
    config_path = adapter_dir / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = BASE_MODEL_NAME
    config["target_modules"] = sorted(config["target_modules"])
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint directory of the demo base")
    parser.add_argument("--out", type=Path, required=True, help="directory that gets one directory per adapter")
    parser.add_argument("--only", choices=tuple(RECIPES), help="train this adapter only")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for adapter in [arguments.only] if arguments.only else RECIPES:
        train_adapter(arguments.base, adapter, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
