"""Score the demo adapters: `python -m loraplex.demo.score --base DIR [--adapters DIR] [--out FILE]`.

Each adapter and the bare base answer the same held-out prompts, greedily, through transformers and PEFT; a score is
the share of answers that pass the adapter's check. Writes the numbers with their settings as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loraplex.demo.checks import CHECKS
from loraplex.demo.data import held_out_prompts
from loraplex.demo.gallery import ADAPTERS_DIR, DEMO_PROMPTS
from loraplex.demo.recipe import BASE_MODEL_NAME, RECIPES, Recipe


@dataclass(frozen=True, slots=True)
class Settings:
    """How the answers were made."""

    base_model: str = BASE_MODEL_NAME
    weights: str = "SmolLM2-135M-Instruct.Q4_1.gguf, dequantized to bfloat16"
    decoding: str = "greedy"
    max_new_tokens: int = 96
    compute_dtype: str = "bfloat16"
    device: str = "cpu"
    batch_size: int = 16
    num_prompts: int = field(default_factory=lambda: len(held_out_prompts()))
    versions: str = field(
        default_factory=lambda: ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    )


@dataclass(frozen=True, slots=True)
class Score:
    """One adapter: shares of the held-out prompts whose answer passes its check, and the prompts that failed."""

    recipe: Recipe
    size_bytes: int
    base: float
    adapter: float
    failed: dict[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """All scores, and what base and adapters answered to the demo prompts: prompt -> name -> answer."""

    settings: Settings
    scores: dict[str, Score]
    demo: dict[str, dict[str, str]]


def score_adapters(base_dir: Path, adapters_dir: Path, names: Sequence[str]) -> Report:
    """Answer every held-out prompt and demo prompt with the base and each adapter of `names`."""
    settings = Settings()
    tokenizer = AutoTokenizer.from_pretrained(base_dir, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    prompts = held_out_prompts()
    base_answers = greedy_answers(base, tokenizer, prompts, settings)
    demo = {
        p: {"base": a}
        for p, a in zip(DEMO_PROMPTS, greedy_answers(base, tokenizer, DEMO_PROMPTS, settings), strict=True)
    }
    scores: dict[str, Score] = {}
    for name in names:
        model = PeftModel.from_pretrained(base, adapters_dir / name)
        answers = greedy_answers(model, tokenizer, prompts, settings)
        for prompt, answer in zip(DEMO_PROMPTS, greedy_answers(model, tokenizer, DEMO_PROMPTS, settings), strict=True):
            demo[prompt][name] = answer
        base = model.unload()
        check = CHECKS[name]
        scores[name] = Score(
            recipe=RECIPES[name],
            size_bytes=sum(file.stat().st_size for file in (adapters_dir / name).iterdir()),
            base=round(sum(map(check, base_answers)) / len(prompts), 3),
            adapter=round(sum(map(check, answers)) / len(prompts), 3),
            failed={prompt: answer for prompt, answer in zip(prompts, answers, strict=True) if not check(answer)},
        )
    return Report(settings, scores, demo)


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: Settings
) -> list[str]:
    """Return the model's greedy answer to each prompt, as one chat turn with the default system message."""
    answers: list[str] = []
    for start in range(0, len(prompts), settings.batch_size):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + settings.batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            token_ids = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False)  # [N, L]
        answer_ids = token_ids[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    return answers


def _score_table(report: Report) -> Table:
    table = Table("adapter", "rank", "targets", "size", "base", "adapter", title="Held-out prompts that pass the check")
    for name, score in report.scores.items():
        table.add_row(
            name,
            str(score.recipe.rank),
            " ".join(score.recipe.targets),
            f"{score.size_bytes / 1e6:.2f} MB",
            f"{score.base:.0%}",
            f"{score.adapter:.0%}",
        )
    return table


def main() -> None:
    """Score, print the table and the demo answers, and write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint directory of the demo base")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR, help="directory of adapter directories")
    parser.add_argument("--only", choices=tuple(RECIPES), help="score this adapter only")
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(RECIPES)
    report = score_adapters(arguments.base, arguments.adapters, names)
    console = Console()
    console.print(_score_table(report))
    for prompt, answers in report.demo.items():
        console.print(f"\n> {prompt}", markup=False, highlight=False, soft_wrap=True)
        for name, answer in answers.items():
            console.print(f"  {name:>7}: {answer}", markup=False, highlight=False, soft_wrap=True)
    if arguments.out is not None:
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
