"""The first step of a server, run at its start over nobody's tokens.

On a GPU it compiles kernels and opens libraries, for which the first request would wait seconds, and it takes the
memory that the largest step needs, so that a start with too little ends here and not under load.
"""

from __future__ import annotations

import torch

from loraplex.engine.batch import Ops
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.segments import SegmentPlan
from loraplex_kernels.states import StateSpan


def warm_up(model: BaseModel, ops: Ops, *, num_tokens: int, num_sampled: int) -> None:
    """One prefill of ``num_tokens`` tokens and a head over ``num_sampled`` rows, as far as the cache holds them.

    Adapter nodes, those that few adapters need among them, run where the backend has a plan of some adapters and no
    row. The cache is left blank; what is in a slot of states means nothing to whoever is given it.
    """
    count, pages, cache = min(num_tokens, model.max_position), range(0), ops.kv_cache
    if cache is not None:
        count = min(count, (cache.num_pages - 1) * cache.page_size)
        pages = range(1, 1 + -(-count // cache.page_size))
    with torch.inference_mode():
        positions = torch.arange(count, device=ops.device)
        forward = ForwardBatch(
            token_ids=positions % model.vocab_size,
            positions=positions,
            attention=ops.attend([SequenceSpan(count, count, pages)]),
            kv_cache=cache,
            adapters=_no_rows(ops, count),
            states=None if ops.states is None else ops.states.prepare([StateSpan(count, slot=0, num_limited=count)]),
        )
        rows = torch.zeros(num_sampled, dtype=torch.int64, device=ops.device)
        model.head(model.forward(forward).index_select(0, rows), _no_rows(ops, num_sampled))
        ops.clear(pages)


def _no_rows(ops: Ops, num_rows: int) -> StepPlan:
    plan = ops.lora.static_plan(num_rows, 1)
    return ops.lora.prepare(SegmentPlan(num_rows, ())) if plan is None else plan.capturing(plan.keys[-1])
