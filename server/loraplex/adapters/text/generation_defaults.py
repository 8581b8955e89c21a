"""An adapter's generation_config.json: its end-of-sequence tokens and its sampling defaults, or a refusal by key.

What transformers' ``GenerationConfig`` (``generation/configuration_utils.py``) does with a key that is not there is
done here: ``do_sample`` false is greedy whatever the temperature, and a sampling ``top_k`` is 50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from loraplex.adapters.reading.source import AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.errors import InvalidAdapter, Mismatch, UnsupportedFeature
from loraplex.types import SamplingParams

GENERATION_FILE: Final = "generation_config.json"
_MAX_BYTES: Final = 1 << 20
_MAX_EOS_IDS: Final = 64
_DEFAULT_TOP_K: Final = 50
#: far more than any vocabulary, and still a number everywhere it goes
_MAX_TOP_K: Final = 1 << 31
_SAMPLING_KEYS: Final = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")

#: keys that choose tokens in ways that no request can ask for here -> the values that leave them off
_UNSERVED: Final[Mapping[str, tuple[object, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": ([], ""),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """``eos_token_ids``: None where the file names none; ``sampling``: None where it is greedy without penalties."""

    eos_token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams | None = None


def read_generation_defaults(
    directory: AdapterDir, vocab_size: int, base: Mapping[str, object] = MappingProxyType({})
) -> GenerationDefaults:
    """What generation_config.json says; neutral when the directory has none.

    ``base``: the values of the base's file. What a copy of it says is none of the adapter's own, and not served as its.

    Raises:
        InvalidAdapter: not JSON, or a value that is none of its kind.
        UnsupportedFeature: a way to choose tokens that is not served, by key.
        Mismatch: an end-of-sequence token past the vocabulary.
    """
    if not directory.has(GENERATION_FILE):
        return GenerationDefaults()
    where = directory.where(GENERATION_FILE)
    values = parse_object(read_small_file(directory, GENERATION_FILE, _MAX_BYTES), where)
    for key, neutral in _UNSERVED.items():
        value = values.get(key)
        if value is not None and value not in neutral and value != base.get(key):
            raise UnsupportedFeature(
                f"{where}: {key} {str(value)[:80]!r} is not served; take the key out to load the adapter without it",
                field=key,
            )
    sampling = None
    if any(values.get(key) != base.get(key) for key in _SAMPLING_KEYS):
        sampling = _sampling(values, where)
    return GenerationDefaults(
        _eos_token_ids(values.get("eos_token_id"), vocab_size, where),
        None if sampling == SamplingParams() else sampling,
    )


def _eos_token_ids(value: object, vocab_size: int, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not 1 <= len(ids) <= _MAX_EOS_IDS or any(type(i) is not int or i < 0 for i in ids):
        raise InvalidAdapter(
            f"{where}: eos_token_id is {str(value)[:80]}, expected a token id or a list of 1 to {_MAX_EOS_IDS}"
        )
    if max(ids) >= vocab_size:
        raise Mismatch(f"{where}: eos_token_id {max(ids)} is past the vocabulary of {vocab_size} tokens")
    return tuple(sorted(set(ids)))


def _sampling(values: Mapping[str, object], where: str) -> SamplingParams:
    read = _Numbers(values, where)
    penalty = read.number("repetition_penalty", 1.0, lambda x: 0 < x <= 100)
    sample = values.get("do_sample")
    if sample is not None and type(sample) is not bool:
        raise InvalidAdapter(f"{where}: do_sample is {str(sample)[:80]!r}, expected true or false")
    if not sample:
        return SamplingParams(repetition_penalty=penalty)
    top_k = read.number("top_k", _DEFAULT_TOP_K, lambda x: x == int(x) and 0 <= x <= _MAX_TOP_K)
    return SamplingParams(
        temperature=read.number("temperature", 1.0, lambda x: 1e-3 <= x <= 100),
        top_p=read.number("top_p", 1.0, lambda x: 0 < x <= 1),
        top_k=int(top_k),
        min_p=read.number("min_p", 0.0, lambda x: 0 <= x <= 1),
        repetition_penalty=penalty,
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    values: Mapping[str, object]
    where: str

    def number(self, key: str, default: float, allowed: Callable[[float], bool]) -> float:
        """A number of the file, or its default. Raises InvalidAdapter: no number, or out of range."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise InvalidAdapter(f"{self.where}: {key} is {str(value)[:80]!r}, expected a number", field=key)
        number = float(str(value))
        if not math.isfinite(number) or not allowed(number):
            raise InvalidAdapter(f"{self.where}: {key} {str(value)[:80]} is out of range", field=key)
        return number
