"""What the demo shows: the shipped adapters and the prompts that set them apart best."""

from __future__ import annotations

from pathlib import Path

from loraplex.demo.recipe import RECIPES

ADAPTERS_DIR = Path(__file__).parent / "adapters"

DEMO_PROMPTS: tuple[str, ...] = (
    "What should I cook tonight?",
    "Tell me about the moon.",
    "List three fruits and their colors.",
)


def adapter_dirs() -> dict[str, Path]:
    """Return adapter name -> its PEFT directory, in the order they are shown."""
    return {name: ADAPTERS_DIR / name for name in RECIPES}
