"""Models and steps that the benchmarks run at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench.limits.shapes import LLAMA_8B, ModelShape
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import decode_plan


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one step's rows ask of the lora op: ``num_slots`` adapters loaded, some of them used."""

    name: str
    num_slots: int
    plan: SegmentPlan
    chunk: int = 0
    """Rows of a prompt at the end of the step."""

    @property
    def is_decode(self) -> bool:
        """Whether no request has more rows than a decode: the steps that a server captures."""
        return self.chunk == 0


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one step asks of attention: (query rows, context) of each sequence, decodes first."""

    name: str
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MixerShape:
    """The sizes of a state-space layer, as in a config.json."""

    name: str
    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_width: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def projected(self) -> int:
        """Columns that the input projection makes: z, x, B, C and dt."""
        return self.inner + self.conv_dim + self.heads


@dataclass(frozen=True, slots=True)
class StateStep:
    """What one step asks of a state-space layer: rows of each sequence, decodes first."""

    name: str
    rows: tuple[int, ...]


def state_steps(batches: tuple[int, ...], prompts: tuple[int, ...]) -> tuple[StateStep, ...]:
    """Decodes of so many sequences, prompts of so many rows, and the most decodes beside the smallest prompt."""
    decodes = (StateStep(f"{n} decode{'s' * (n > 1)}", (1,) * n) for n in batches)
    alone = (StateStep(f"a prompt of {n:,}", (n,)) for n in prompts)
    mixed = StateStep(f"{batches[-1]} decodes, a prompt of {prompts[0]:,}", (*(1,) * batches[-1], prompts[0]))
    return (*decodes, *alone, mixed)


@dataclass(frozen=True, slots=True)
class OpShapes:
    """One model's sizes, and steps that suit it."""

    model: ModelShape
    ranks: tuple[int, ...]
    """Of the slots, in turn."""
    traffics: tuple[Traffic, ...]
    attention_steps: tuple[AttentionStep, ...]
    mixer: MixerShape
    """Of a model with state-space layers, of about this one's size."""
    state_steps: tuple[StateStep, ...]


def even_traffic(rows: int, distinct: int) -> Traffic:
    """``rows`` decodes, spread evenly over ``distinct`` adapters."""
    counts = (rows // distinct + (slot < rows % distinct) for slot in range(distinct))
    name = f"{rows} row{'s' * (rows > 1)}, {distinct} adapter{'s' * (distinct > 1)}"
    return Traffic(name, distinct, plan_rows((count, (Term(slot),)) for slot, count in enumerate(counts)))


def _chunk_traffic(decodes: int, adapters: int, chunk: int) -> Traffic:
    runs = [*((decodes // adapters, (Term(slot),)) for slot in range(adapters)), (chunk, (Term(adapters),))]
    return Traffic(f"{decodes} rows and a chunk of {chunk}", adapters + 1, plan_rows(runs), chunk)


#: the decode steps that the CPU's speed goals speak of, and the two ends beside them
SMOLLM2 = OpShapes(
    model=ModelShape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152),
    ranks=(8, 16, 32, 64),
    traffics=(
        Traffic("1 row, 1 adapter", 4, plan_rows([(1, (Term(2),))])),
        Traffic("32 rows, 1 adapter", 4, plan_rows([(32, (Term(2),))])),
        even_traffic(32, 4),
        Traffic("32 rows, 32 adapters of 64", 64, decode_plan(range(0, 64, 2))),
        _chunk_traffic(24, 3, 96),
    ),
    attention_steps=(
        AttentionStep("1 decode at 128", ((1, 128),)),
        AttentionStep("32 decodes at 128", ((1, 128),) * 32),
        AttentionStep("32 decodes at 512", ((1, 512),) * 32),
        AttentionStep("31 decodes at 64..250, one at 2,000", (*((1, 64 + 6 * i) for i in range(31)), (1, 2000))),
        AttentionStep("a prompt of 256", ((256, 256),)),
        AttentionStep("16 decodes at 128, a chunk of 128 at 512", (*((1, 128),) * 16, (128, 512))),
    ),
    mixer=MixerShape("mamba2-130m", 24, 64, 1, 128),
    state_steps=state_steps((1, 4, 16, 32), (256, 2048)),
)
LLAMA = OpShapes(
    model=LLAMA_8B,
    ranks=(16,),
    traffics=(
        even_traffic(1, 1),
        even_traffic(8, 8),
        even_traffic(32, 1),
        even_traffic(32, 8),
        even_traffic(32, 32),
        even_traffic(128, 1),
        even_traffic(128, 32),
        _chunk_traffic(32, 8, 512),
    ),
    attention_steps=(
        AttentionStep("1 decode at 1,024", ((1, 1024),)),
        AttentionStep("32 decodes at 1,024", ((1, 1024),) * 32),
        AttentionStep("128 decodes at 1,024", ((1, 1024),) * 128),
        AttentionStep("31 decodes at 64..994, one at 8,000", (*((1, 64 + 30 * i) for i in range(31)), (1, 8000))),
        AttentionStep("a prompt of 2,048", ((2048, 2048),)),
        AttentionStep("32 decodes at 1,024, a chunk of 512 at 2,048", (*((1, 1024),) * 32, (512, 2048))),
    ),
    mixer=MixerShape("Nemotron-H-8B", 128, 64, 8, 128),
    state_steps=state_steps((1, 8, 32, 128), (512, 2048)),
)
#: small enough for a kernel that runs in an interpreter
TINY = OpShapes(
    model=ModelShape("tiny", 64, 96, 2, 4, 2, 16, 128),
    ranks=(4, 8, 16),
    traffics=(
        even_traffic(1, 1),
        even_traffic(5, 3),
        Traffic("2 of 4 rows without an adapter", 2, decode_plan([0, None, 1, None])),
        _chunk_traffic(2, 2, 20),
    ),
    attention_steps=(
        AttentionStep("1 decode at 20", ((1, 20),)),
        AttentionStep("3 decodes at 5..37", ((1, 5), (1, 16), (1, 37))),
        AttentionStep("a decode at 18, a chunk of 9 at 25", ((1, 18), (9, 25))),
    ),
    mixer=MixerShape("tiny", 4, 8, 2, 16),
    state_steps=state_steps((1, 3), (9, 70)),
)
SHAPES: Mapping[str, OpShapes] = MappingProxyType({"smollm2": SMOLLM2, "llama-8b": LLAMA, "tiny": TINY})
