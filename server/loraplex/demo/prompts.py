"""Example prompts for a router among demo adapters: `python -m loraplex.demo.prompts DIR`.

The style adapters learnt their styles from the same prompts, so no prompt tells them apart: this is another task, made
of the same catalog. Questions about a business's data are for `sql`, lists with columns for `json`, and small talk and
questions about the world for `pirate`. Held-out prompts are those that the adapters are scored on.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from loraplex.demo import data
from loraplex.demo.catalog import BUSINESS, HELD_OUT_BUSINESS, HELD_OUT_TABLES, TABLES
from loraplex.demo.facts import FACTS
from loraplex.demo.words import EVERYDAY, FORMS

_LISTS_OF_A_TABLE = 8
_FORMS_OF_A_SUBJECT = 2
_FILLINGS_OF_A_QUESTION = 8
_NUMBERS = ("two", "three", "four", "five")


def routing_prompts(seed: int = 0) -> dict[str, list[str]]:
    """Return adapter name -> training prompts that are for it, each once; none is a held-out one."""
    rng = random.Random(f"routing {seed}")
    sql = [data.fill(prompt, "", rng).prompt for prompt, _ in BUSINESS for _ in range(_FILLINGS_OF_A_QUESTION)]
    lists = [
        data.list_prompt(table, rng.randrange(1 + len(table.columns)), rng.choice(_NUMBERS), rng)
        for table in TABLES
        for _ in range(_LISTS_OF_A_TABLE)
    ]
    talk = [form.format(subject) for subject in FACTS for form in rng.sample(FORMS, _FORMS_OF_A_SUBJECT)]
    talk += [prompt for prompt, _ in EVERYDAY]
    return {name: list(dict.fromkeys(some)) for name, some in (("sql", sql), ("json", lists), ("pirate", talk))}


def held_out_routing_prompts(seed: int = 0) -> dict[str, list[str]]:
    """Return adapter name -> the held-out prompts that are for it: all 52 of `data.held_out_prompts`."""
    prompts = data.held_out_prompts(seed)
    num_lists = 2 * len(HELD_OUT_TABLES)
    num_business = len(HELD_OUT_BUSINESS)
    first_list = len(prompts) - num_lists - num_business
    return {
        "sql": prompts[first_list + num_lists :],
        "json": prompts[first_list : first_list + num_lists],
        "pirate": prompts[:first_list],
    }


def main() -> None:
    """Write `NAME.txt` and `held-out-NAME.txt` for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for prefix, found in (("", routing_prompts()), ("held-out-", held_out_routing_prompts())):
        for name, prompts in found.items():
            (directory / f"{prefix}{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
            print(f"{directory / f'{prefix}{name}.txt'}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
