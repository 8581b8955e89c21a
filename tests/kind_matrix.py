"""The matrix of kinds: one tiny base, an adapter of every recipe, prompts for each, and what PEFT answers to them.

Everything is made once per folder and kept there, which several processes may share; nothing here runs Loraplex.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from zlib import crc32

import msgspec

from loraplex.types import AdapterRef, Request, StopRule
from tests.kind_modules import MODULES
from tests.oracle import Alone, fresh
from tests.peft_kinds import INVOCATION, TRAINED_TOKENS, WIDE_VOCAB, Recipe, recipes, recipes_of, save
from tests.tiny import made_whole, prompt, tiny_checkpoint

MAX_TOKENS: Final = 5
#: of a row of logits, from the best to the second: float32 cannot turn them round, so that equality is no luck
MARGIN: Final = 2e-3
#: biases wherever a llama can have them; qwen3 has none, and norms of heads
BASES: Final = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {}}
_BIASES: Final = {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}
#: those with state-space layers -> family and what it is made with; biases of all that can have them in most
STATE_BASES: Final[Mapping[str, tuple[str, Mapping[str, object]]]] = MappingProxyType(
    {
        "mamba2": ("mamba2", {"use_bias": True}),
        "mamba2-1-group": ("mamba2", {"n_groups": 1}),
        "mamba2-8-groups": ("mamba2", {"n_groups": 8, "use_bias": True}),
        "bamba": ("bamba", {**_BIASES, "mamba_n_groups": 1}),
        "falcon_h1": ("falcon_h1", {**_BIASES, "projectors_bias": True}),
        "nemotron_h": ("nemotron_h", {"use_bias": True, "mlp_bias": True, "n_groups": 8}),
        "granitemoehybrid": ("granitemoehybrid", {"attention_bias": True, "mamba_proj_bias": True}),
    }
)
#: a beginning that all long prompts share, so that the prefix cache has something to mix up; four whole pages
_SHARED: Final = tuple(token for token in prompt(30, seed=77) if token not in INVOCATION)[:17]
_SEEDS: Final = 50


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what PEFT answers to it alone. ``name``: of its recipe; empty: the base."""

    name: str
    request: Request
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A base whose head is not tied, as it is served, with its weights in a dense checkpoint, on which adapters are
    made. ``model``: what PEFT puts a recipe's adapter on, new each time."""

    served: Path
    dense: Path
    model: Callable[[str], Any]


class KindMatrix:
    """The adapters of one base and their cases. ``root`` keeps the checkpoints and adapter directories."""

    def __init__(
        self,
        root: Path,
        base: str,
        *,
        tied: bool,
        gentle: bool = False,
        stored: Stored | None = None,
        among: Collection[str] | None = None,
    ) -> None:
        """``base``: of ``BASES`` or ``STATE_BASES``; ``gentle``: weights of bfloat16 so small that the model does not
        make more of a rounding than it is; ``among``: the recipes wanted, None: all that can be made."""
        arch, overrides = STATE_BASES.get(base) or (base, BASES[base])
        gently = {"initializer_range": 0.1, "dtype": "bfloat16"} if gentle else {}
        self.root = root
        if stored is None:
            base_dir = tiny_checkpoint(root, arch, **{"tie_word_embeddings": tied, **overrides, **gently})
            stored = Stored(base_dir, base_dir, lambda name: fresh(base_dir))
        self.base_dir = stored.served
        self.recipes = recipes_of(MODULES[arch])
        self.names = tuple(name for name in recipes(tied, self.recipes) if among is None or name in among)
        self._stored = stored
        self._share = 0.1 if gentle else 1.0
        self._adapters = self.base_dir.with_name(f"{self.base_dir.name}-adapters")
        self._oracles: dict[str, Alone] = {}
        self._cases: dict[str, tuple[Case, ...]] = {}

    def adapter(self, name: str) -> Path:
        """The directory of a recipe's adapter."""
        path = self._adapters / name
        if not path.exists():
            with made_whole(path) as part:
                save(self.recipes[name].softened(self._share), self._stored.dense, part, seed=crc32(name.encode()))
        return path

    def oracle(self, name: str) -> Alone:
        """PEFT with one adapter; an empty name is the base."""
        if name not in self._oracles:
            made = self.adapter(name) if name else None
            vocab_size = self.recipes[name].vocab_size if name else 0
            self._oracles[name] = Alone.on(self._stored.model(name), made, vocab_size=vocab_size)
        return self._oracles[name]

    def cases(self, name: str) -> tuple[Case, ...]:
        """Prompts for one adapter: a long one that holds all that wakes it, and a short one that does not."""
        if name not in self._cases:
            path = self.base_dir.with_name(f"{self.base_dir.name}-cases") / f"{name or 'base'}.json"
            if not path.exists():
                with made_whole(path) as part:
                    part.write_bytes(msgspec.json.encode([self._case(name, long=long) for long in (True, False)]))
            self._cases[name] = msgspec.json.decode(path.read_bytes(), type=tuple[Case, ...])
        return self._cases[name]

    def all_cases(self) -> Iterator[Case]:
        """Those of every adapter and of the base."""
        for name in ("", *self.names):
            yield from self.cases(name)

    def long_request(self, name: str, seed: int = 1) -> Request:
        """A prompt that holds all that wakes an adapter."""
        return Request(
            f"{name or 'base'}-long",
            _long_prompt(self.recipes[name] if name else None, seed),
            adapters=(AdapterRef(name),) if name else (),
            stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True),
        )

    def short_request(self, name: str, seed: int = 1) -> Request:
        """A prompt of a page or two that does not invoke an adapter which has to be."""
        return msgspec.structs.replace(
            self.long_request(name),
            request_id=f"{name or 'base'}-short",
            prompt_token_ids=prompt(6 + seed % 5, seed=seed),
        )

    def _case(self, name: str, *, long: bool) -> Case:
        first = (["", *self.recipes].index(name) * 2 + long) * _SEEDS
        asked = self.long_request if long else self.short_request
        return clear_case(name, self.oracle(name), (asked(name, seed) for seed in range(first, first + _SEEDS)))


def clear_case(name: str, oracle: Alone, requests: Iterable[Request]) -> Case:
    """The first request whose answer does not hang on the last bits of float32."""
    for request in requests:
        rows = oracle.rows(request.prompt_token_ids, request.stop.max_tokens)
        best = [row.topk(2).values for row in rows]
        if min(float(first - second) for first, second in best) > MARGIN:
            return Case(name, request, tuple(int(row.argmax()) for row in rows))
    raise AssertionError(f"{name}: no prompt has clear answers")


def _long_prompt(recipe: Recipe | None, seed: int) -> tuple[int, ...]:
    """Trained tokens, new tokens, and the invocation twice, the last time near the end."""
    own, tail = prompt(5, seed=seed), prompt(3, seed=seed + 1)
    invocation = () if recipe is None else recipe.invocation_tokens
    added = (WIDE_VOCAB - 1, WIDE_VOCAB - 4) if recipe is not None and recipe.vocab_size else ()
    return (*_SHARED, *invocation, *own, *TRAINED_TOKENS[:3], *added, *invocation, *tail)
