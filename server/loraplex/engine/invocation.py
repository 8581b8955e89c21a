"""Where an activated LoRA (aLoRA) begins: at the last place where the prompt holds its invocation tokens.

Source: peft 0.21 tuners/lora/variants.py ``calculate_alora_offsets``. The adapter is on from the first of these tokens
on, for the rest of the prompt and for all that is generated, whatever that holds.
"""

from __future__ import annotations

from collections.abc import Sequence


def last_place(tokens: Sequence[int], of: Sequence[int]) -> int | None:
    """The largest index at which ``of`` (at least one token) stands in ``tokens``; None: nowhere.

    Linear in both lengths, whatever they hold: read backwards, after Knuth, Morris and Pratt.
    """
    wanted = of[::-1]
    borders = _borders(wanted)
    matched = 0
    for index in range(len(tokens) - 1, -1, -1):
        while matched and tokens[index] != wanted[matched]:
            matched = borders[matched - 1]
        if tokens[index] == wanted[matched]:
            matched += 1
        if matched == len(wanted):
            return index
    return None


def _borders(pattern: Sequence[int]) -> list[int]:
    """Per prefix of ``pattern``, the length of the longest shorter one that it ends with."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
