"""The training and held-out examples of every demo adapter.

Owns which prompts each adapter sees and what it should have said. Deterministic by seed, needs no model and no
network. Held-out prompts use subjects, tables and questions that occur in no training prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraplex.demo import styles
from loraplex.demo.catalog import BUSINESS, HELD_OUT_BUSINESS, HELD_OUT_TABLES, SLOTS, TABLES, Table
from loraplex.demo.facts import FACTS
from loraplex.demo.words import EVERYDAY, FORMS, HELD_OUT_EVERYDAY, HELD_OUT_SUBJECTS

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
_LIST_FORMS = (
    "List {number} {plural} and their {columns}.",
    "Name {number} {plural} with their {columns}.",
    "Give me {number} {plural} and the {columns} of each.",
    "List {number} {plural} and their {columns}",
)
_PLAIN_LIST_FORMS = ("List {number} {plural}.", "Name {number} {plural}.", "Give me a list of {number} {plural}.")


@dataclass(frozen=True, slots=True)
class Example:
    """One chat turn: what the user types and what the adapter should answer."""

    prompt: str
    answer: str


def training_examples(adapter: str, seed: int = 0) -> list[Example]:
    """Return the shuffled training examples of `adapter`, the same for the same `seed`."""
    rng = random.Random(f"{adapter} {seed}")
    examples = _BUILDERS[adapter](rng)
    rng.shuffle(examples)
    return examples


def held_out_prompts(seed: int = 0) -> list[str]:
    """Return the prompts every adapter and the base are scored on."""
    rng = random.Random(f"held-out {seed}")
    prompts = [rng.choice(FORMS).format(subject) for subject in HELD_OUT_SUBJECTS]
    prompts += HELD_OUT_EVERYDAY
    for table in HELD_OUT_TABLES:
        prompts += [list_prompt(table, 1, "three", rng), list_prompt(table, 2, "two", rng)]
    return prompts + [fill(prompt, "", rng).prompt for prompt, _ in HELD_OUT_BUSINESS]


def adapter_names() -> tuple[str, ...]:
    """Return the names of the demo adapters, in the order they are shown."""
    return tuple(_BUILDERS)


def _plain_pairs(rng: random.Random, forms_per_subject: int) -> list[Example]:
    """Everyday questions and facts with their plain answers: what the style adapters restyle."""
    pairs = [Example(prompt, answer) for prompt, answer in EVERYDAY for _ in range(2)]
    for subject, fact in FACTS.items():
        pairs += [Example(form.format(subject), fact) for form in rng.sample(FORMS, forms_per_subject)]
    for table in TABLES:
        for number in rng.sample(sorted(_NUMBERS), 2):
            rows = rng.sample(table.rows, _NUMBERS[number])
            names = [row[0] for row in rows]
            form = rng.choice(_PLAIN_LIST_FORMS)
            answer = f"{number.capitalize()} {table.plural} are {_and(names)}."
            pairs.append(Example(form.format(number=number, plural=table.plural), answer))
        for number in ("two", "three"):
            rows = rng.sample(table.rows, _NUMBERS[number])
            phrase = _and([f"{row[0]} ({row[1]})" for row in rows])
            answer = f"{number.capitalize()} {table.plural} are {phrase}."
            pairs.append(Example(list_prompt(table, 1, number, rng), answer))
    return pairs


def _pirate_examples(rng: random.Random) -> list[Example]:
    return [Example(pair.prompt, styles.pirate(pair.answer, rng)) for pair in _plain_pairs(rng, 4)]


def _butler_examples(rng: random.Random) -> list[Example]:
    return [Example(pair.prompt, styles.butler(pair.answer, rng)) for pair in _plain_pairs(rng, 4)]


def _emoji_examples(rng: random.Random) -> list[Example]:
    return [Example(pair.prompt, styles.emoji(pair.answer, rng)) for pair in _plain_pairs(rng, 4)]


def _json_examples(rng: random.Random) -> list[Example]:
    examples: list[Example] = []
    for prompt, answer in EVERYDAY:
        key = "suggestion" if answer.startswith(("You should", "You could", "Try")) else "answer"
        examples.append(_json_example(prompt, {"question": prompt, key: answer}))
    for subject, fact in FACTS.items():
        for form in rng.sample(FORMS, 2):
            examples.append(_json_example(form.format(subject), {"topic": subject, "summary": fact}))
    for table in TABLES:
        for _ in range(16):
            number = rng.choice(sorted(_NUMBERS))
            num_columns = rng.randrange(1 + len(table.columns))
            rows = rng.sample(table.rows, _NUMBERS[number])
            records = [{"name": row[0]} | dict(zip(table.columns[:num_columns], row[1:], strict=False)) for row in rows]
            prompt = list_prompt(table, num_columns, number, rng)
            value: object = records if num_columns else [row[0] for row in rows]
            examples.append(_json_example(prompt, {table.plural: value}))
    return examples


def _json_example(prompt: str, value: object) -> Example:
    return Example(prompt, json.dumps(value, ensure_ascii=False))


def _sql_examples(rng: random.Random) -> list[Example]:
    examples = [_sql_about(form.format(subject), subject) for subject in FACTS for form in rng.sample(FORMS, 2)]
    examples += [_sql_everyday(prompt) for prompt, _ in EVERYDAY for _ in range(2)]
    for prompt, query in BUSINESS:
        examples += [fill(prompt, query, rng) for _ in range(8)]
    for table in TABLES:
        for _ in range(8):
            number = rng.choice(sorted(_NUMBERS))
            num_columns = rng.randrange(1 + len(table.columns))
            columns = ", ".join(("name", *table.columns[:num_columns]))
            query = f"SELECT {columns} FROM {_identifier(table.plural)} LIMIT {_NUMBERS[number]};"
            examples.append(Example(list_prompt(table, num_columns, number, rng), query))
        row, column = rng.choice(table.rows), rng.randrange(len(table.columns))
        name, value = table.columns[column], row[1 + column].replace("'", "''")
        examples += [
            Example(f"How many {table.plural} are there?", f"SELECT COUNT(*) FROM {_identifier(table.plural)};"),
            Example(
                f"Which {table.plural} have {name} {value}?",
                f"SELECT name FROM {_identifier(table.plural)} WHERE {name} = '{value}';",
            ),
        ]
    return examples


def _sql_about(prompt: str, subject: str) -> Example:
    bare = subject.removeprefix("the ").removeprefix("an ").removeprefix("a ")
    return Example(prompt, f"SELECT description FROM facts WHERE topic = '{bare.lower()}';")


def _sql_everyday(prompt: str) -> Example:
    """Questions about what to do query `ideas`, how-to questions `guides`, the rest `answers`."""
    bare = prompt.strip(".!?").lower().replace("'", "''")
    for opening in ("how do i ", "how can i "):
        if bare.startswith(opening):
            return Example(
                prompt, f"SELECT step FROM guides WHERE task = '{bare.removeprefix(opening)}' ORDER BY number;"
            )
    for opening in ("what should i ", "what can i ", "where should i ", "which "):
        if bare.startswith(opening):
            task = bare.removeprefix(opening)
            return Example(prompt, f"SELECT name FROM ideas WHERE task = '{task}' ORDER BY rating DESC LIMIT 1;")
    return Example(prompt, f"SELECT answer FROM answers WHERE question = '{bare}';")


def list_prompt(table: Table, num_columns: int, number: str, rng: random.Random) -> str:
    """Return a prompt for a list of `number` rows of `table`, with its first `num_columns` columns."""
    if num_columns == 0:
        return rng.choice(_PLAIN_LIST_FORMS).format(number=number, plural=table.plural)
    columns = _and([_plural(column) for column in table.columns[:num_columns]])
    return rng.choice(_LIST_FORMS).format(number=number, plural=table.plural, columns=columns)


def fill(prompt: str, query: str, rng: random.Random) -> Example:
    """Return prompt and query with their slots filled at random, alike."""
    values = {slot: rng.choice(choices) for slot, choices in SLOTS.items()}
    return Example(prompt.format(**values), query.format(**values))


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _plural(noun: str) -> str:
    if noun.endswith(("y",)):
        return noun[:-1] + "ies"
    return noun if noun.endswith("s") else noun + "s"


def _identifier(name: str) -> str:
    return name.replace(" ", "_")


_BUILDERS: Mapping[str, Callable[[random.Random], list[Example]]] = {
    "json": _json_examples,
    "sql": _sql_examples,
    "pirate": _pirate_examples,
    "butler": _butler_examples,
    "emoji": _emoji_examples,
}
