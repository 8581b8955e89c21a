"""What every layer of one step shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.layers.rotary import Rotation
from loraplex_kernels.attention import AttentionPlan, KVCache
from loraplex_kernels.conv import ConvPlan
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.ssd import SsdPlan
from loraplex_kernels.states import StatePool, StateSpan


@dataclass(frozen=True, slots=True)
class StateStep:
    """What a step does with the states of its sequences; both plans are of the same ``spans``, in row order."""

    pool: StatePool
    conv: ConvPlan
    ssd: SsdPlan
    spans: Sequence[StateSpan]


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One step as its layers see it. A model without attention has neither plan nor cache, one without rotary embedding
    no rotation, one without state-space layers no states."""

    adapters: StepPlan
    rotation: Rotation | None
    attention: AttentionPlan | None
    kv_cache: KVCache | None
    states: StateStep | None
