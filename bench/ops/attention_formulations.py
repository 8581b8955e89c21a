"""Attention in plain torch on contexts that lie contiguous, heads already repeated: no pages, no groups, no gather."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from bench.ops.sequences import Sequences

sdpa = torch.nn.functional.scaled_dot_product_attention

#: returns out, [T, heads * head_dim]
Attend = Callable[[], torch.Tensor]


def one_by_one(sequences: Sequences) -> Attend:
    """One call for each sequence."""
    inputs = []
    for index, queries in enumerate(sequences.queries):
        keys, values = _repeated(sequences, index)
        inputs.append((_batched(queries), _batched(keys), _batched(values), _mask(sequences, index)))

    def attend() -> torch.Tensor:
        outs = [sdpa(q, k, v, attn_mask=mask, scale=sequences.scale) for q, k, v, mask in inputs]
        return torch.cat([out[0].transpose(0, 1).flatten(1) for out in outs])

    return attend


def padded(sequences: Sequences) -> Attend:
    """One call for all, queries and contexts padded to the longest, padding masked."""
    counts = sequences.counts
    num, most, longest = len(counts), max(n for n, _ in counts), max(c for _, c in counts)
    _, heads, head_dim = sequences.q.shape
    q = sequences.q.new_zeros(num, heads, most, head_dim)
    k, v = (sequences.q.new_zeros(num, heads, longest, head_dim) for _ in "kv")
    mask = torch.zeros(num, 1, most, longest, dtype=torch.bool, device=q.device)
    mask[..., 0] = True  # a row of padding sees something: softmax of nothing is not a number
    rows = []
    for index, (queries, (n, c)) in enumerate(zip(sequences.queries, counts, strict=True)):
        keys, values = _repeated(sequences, index)
        q[index, :, :n], k[index, :, :c], v[index, :, :c] = (t.transpose(0, 1) for t in (queries, keys, values))
        mask[index, 0, :n, :c] = torch.ones(n, c, dtype=torch.bool, device=q.device).tril(c - n)
        rows += [index * most + row for row in range(n)]
    taken = torch.tensor(rows, device=q.device)

    def attend() -> torch.Tensor:
        out = sdpa(q, k, v, attn_mask=mask, scale=sequences.scale)  # [num, heads, most, head_dim]
        return out.transpose(1, 2).reshape(num * most, heads * head_dim)[taken]

    return attend


def _repeated(sequences: Sequences, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's keys and values, [context, heads, head_dim]."""
    keys, values = sequences.keys[index], sequences.values[index]
    return keys.repeat_interleave(sequences.group, 1), values.repeat_interleave(sequences.group, 1)


def _batched(rows: torch.Tensor) -> torch.Tensor:
    """[rows, heads, head_dim] -> [1, heads, rows, head_dim]"""
    return rows.transpose(0, 1)[None].contiguous()


def _mask(sequences: Sequences, index: int) -> torch.Tensor | None:
    """Which context each query row sees; None when it sees all of it."""
    rows, context = sequences.counts[index]
    if rows == 1:
        return None
    return torch.ones(rows, context, dtype=torch.bool, device=sequences.q.device).tril(context - rows)


FORMULATIONS: Mapping[str, Callable[[Sequences], Attend]] = MappingProxyType(
    {"sdpa, one by one": one_by_one, "sdpa, padded": padded}
)
