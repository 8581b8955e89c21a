"""How many bytes the merge of a site takes at its height, beside its inputs and what comes of it: not less than that,
and not much more.

By this a second thread is let in: two sites are merged at once where both have room in one dense matrix, that of the
largest site. The numbers are what was measured (``tests/adapters/test_merging_memory.py``).
"""

from __future__ import annotations

from typing import Final

import torch

from loraplex.adapters.merging.left_vectors import finds_leading, width_of
from loraplex.adapters.merging.matrix import block_elements
from loraplex.adapters.merging.methods import METHODS, Form, Pruning
from loraplex.adapters.merging.sums import SiteSum
from loraplex.models.sites import Site
from loraplex.types import MergeOptions

_FLOAT, _DOUBLE = torch.float32.itemsize, torch.float64.itemsize
#: of what is small, and Python's own: beside factors, and beside a dense change
_BESIDE, _BESIDE_DENSE = 3 << 16, 1 << 16
#: in all factors: of factor-wise merges, of the sum itself, of what is compressed to a rank, and to an error
_FACTOR_WISE, _SUM, _TO_RANK, _TO_ERROR = 1.0, 2.5, 2.9, 5.0
#: in float64 squares of the shorter side: all eigenvectors, LAPACK's work on them, and the matrix
_ALL_VECTORS: Final = 4.2
#: in dense matrices: a whole decomposition by LAPACK; at least of squares of 768
_WHOLE: Final = 4.5
#: in float32 squares of the shorter side: half of it, and its diagonal parts
_GRAM: Final = 0.625
#: blocks of vectors that are there while one is multiplied
_VECTORS: Final = 5


def dense_bytes(site: Site) -> int:
    """Of the site's matrix."""
    return site.in_features * site.out_features * _FLOAT


def room_of(found: SiteSum, max_rank: int, options: MergeOptions) -> int:
    """Of a site's merge; ``max_rank`` is that of the inputs, at all sites."""
    site, parts = found.site, found.parts
    if not parts:
        return _BESIDE
    method = METHODS[options.method]
    factors = sum(part.low_rank.rank for part in parts) * (site.in_features + site.out_features) * _FLOAT
    if method.form is Form.FACTOR_WISE:
        return int(_FACTOR_WISE * factors) + _BESIDE
    if method.form is Form.CAT or (method.is_sum and not options.svd_clamp):
        compressed = _TO_ERROR if options.max_error else _TO_RANK
        asked = method.form is Form.SVD or options.max_error or options.svd_rank
        return int((compressed if asked else _SUM) * factors) + _BESIDE
    bits = 0 if method.pruning is Pruning.NONE else len(parts) * dense_bytes(site) // _FLOAT // 8
    return bits + _of_dense(site, options.svd_rank or max_rank, options) + _BESIDE_DENSE


def _of_dense(site: Site, rank: int, options: MergeOptions) -> int:
    short, long = sorted((site.in_features, site.out_features))
    if options.svd_clamp:
        return int(_WHOLE * max(short * long, 1 << 19)) * _FLOAT
    if options.max_error or not finds_leading(short, rank):
        return int(_ALL_VECTORS * short * short) * _DOUBLE
    width, block = width_of(rank), block_elements(short, long)
    iterated = max(block, _VECTORS * short * width) * _FLOAT
    proven = (2 * short * width + block) * _DOUBLE + width * long * _FLOAT
    return max(int(_GRAM * short * short) * _FLOAT + iterated, proven)
