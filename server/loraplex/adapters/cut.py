"""One rank's part of a lowered adapter, cut as the base is: by the algebra alone, whatever kind it was.

Of a site that is cut by outputs a rank has its rows of B, scales and shifts, and all of A; of one cut by inputs its
columns of A, and all of B, which it multiplies before the sum over ranks that the layer makes anyway. What is added
once (shifts there, tokens past the vocabulary) is the first rank's. A direction of the low-rank part that is zero on a
rank is not kept there: of block-diagonal factors whose blocks are the ranks' own, that leaves each 1/N of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.nn import functional as F

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.layers.embedding import FOREIGN_COLUMNS
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.runs import places, take
from loraplex.parallel.shard import Part, Runs, Shard, length


def cut(deltas: Mapping[str, SiteDelta], sites: Mapping[str, Site], rank: int, size: int) -> dict[str, SiteDelta]:
    """What ``rank`` of ``size`` keeps of ``deltas``: sites of which it has nothing are left out. Tensors that are not
    whole are its own."""
    if size == 1:
        return dict(deltas)
    found = {name: _cut(delta, sites[name], sites[name].part(rank, size)) for name, delta in deltas.items()}
    return {name: delta for name, delta in found.items() if delta.tensors}


def largest_part(deltas: Mapping[str, SiteDelta], sites: Mapping[str, Site], size: int) -> int:
    """Bytes of what the rank that keeps most keeps of ``deltas``, before they are laid out."""
    parts = (cut(deltas, sites, rank, size) for rank in range(size))
    return max(sum(delta.nbytes for delta in part.values()) for part in parts)


def _cut(delta: SiteDelta, site: Site, part: Part) -> SiteDelta:
    rows = None if delta.rows is None else _cut_rows(delta.rows, site, part)
    low_rank = None if delta.low_rank is None else _cut_factors(delta.low_rank, site, part)
    if part.shard is Shard.COLUMN:
        return replace(
            delta,
            low_rank=low_rank,
            out_scale=_of(delta.out_scale, part.rows),
            shift=_of(delta.shift, part.rows),
            rows=rows,
        )
    if part.shard is Shard.ROW:
        in_scale, shift = _of(delta.in_scale, (part.cols,)), delta.shift if part.leads else None
        return replace(delta, low_rank=low_rank, in_scale=in_scale, shift=shift, rows=rows)
    return delta


def _of(vector: torch.Tensor | None, runs: Runs) -> torch.Tensor | None:
    return None if vector is None else take(vector, runs).clone()


def _cut_factors(low_rank: LowRank, site: Site, part: Part) -> LowRank | None:
    a, b = low_rank.a, low_rank.b
    if part.shard is Shard.REPLICATED:
        return low_rank
    if part.shard is Shard.COLUMN:
        b = take(b, part.rows)
        used = b.any(0)
    else:
        a = a[:, part.cols]
        used = a.any(1)
    if not bool(used.any()):
        return None
    a, b = (a.clone(), b.clone()) if bool(used.all()) else (a[used], b[:, used])
    if site.kind is SiteKind.EMBEDDING:
        a = F.pad(a, (0, FOREIGN_COLUMNS))
    return LowRank(a, b, low_rank.scale)


def _cut_rows(rows: Rows, site: Site, part: Part) -> Rows | None:
    """``rows`` with indices that count what the rank has, those of added tokens behind its last one. A row that it has
    twice is there for both."""
    if part.shard is Shard.REPLICATED:
        return rows
    if part.shard is Shard.ROW and site.kind is SiteKind.LINEAR:
        return Rows(rows.values[:, part.cols].clone(), rows.indices, rows.bias if part.leads else None)
    embeds = site.kind is SiteKind.EMBEDDING
    runs, total = ((part.cols,), site.in_features) if embeds else (part.rows, site.out_features)
    mine = places(runs)
    if rows.indices is None:
        stop = len(rows.values) if part.leads else total
        kept, indices = torch.cat((mine, torch.arange(total, stop))), None
    else:
        wanted = torch.isin(mine, rows.indices).nonzero().squeeze(1)
        kept = torch.searchsorted(rows.indices, mine[wanted])
        added = (rows.indices >= total).nonzero().squeeze(1) if part.leads else kept[:0]
        kept, indices = torch.cat((kept, added)), torch.cat((wanted, rows.indices[added] - total + length(runs)))
        if not len(kept):
            return None
    return Rows(rows.values[kept], indices, None if rows.bias is None else rows.bias[kept])
