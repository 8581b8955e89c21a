"""How many bytes the merge of a site through its dense change takes at its height, beside its inputs and what comes of
it: not less than that, and not much more.

By this a second thread is let in: two sites are merged at once where both have room in one dense matrix, that of the
largest site. The numbers are what was measured (``tests/adapters/test_merging_memory.py``).
"""

from __future__ import annotations

from typing import Final

import torch

from loraplex.adapters.merging.left_vectors import finds_leading, width_of
from loraplex.adapters.merging.matrix import block_elements
from loraplex.adapters.merging.methods import METHODS, Pruning
from loraplex.models.sites import Site
from loraplex.types import MergeOptions
from loraplex_kernels.merging import BLOCK_COLUMNS

_FLOAT, _DOUBLE = torch.float32.itemsize, torch.float64.itemsize
#: of what is small, and Python's own
_BESIDE: Final = 1 << 16
#: in float64 squares of the shorter side: all eigenvectors, in the place of the matrix, and LAPACK's work on them
_ALL_VECTORS: Final = 3.1
#: in dense matrices: a whole decomposition by LAPACK; at least of squares of 768
_WHOLE: Final = 4.5
#: in squares of the shorter side: half of one, and its diagonal parts
_GRAM: Final = 0.625
#: blocks of vectors that are there while one is multiplied; and in float64 while they are proven, with so many small
#: squares
_VECTORS, _PROVEN, _SMALL = 4, 4, 4


def dense_bytes(site: Site) -> int:
    """Of the site's matrix."""
    return site.in_features * site.out_features * _FLOAT


def room_of(
    site: Site, num_inputs: int, max_rank: int, options: MergeOptions, dtype: torch.dtype = torch.float32
) -> int:
    """Of a site's merge; ``max_rank`` is that of the inputs, at all sites. ``dtype``: where a few singular vectors are
    looked for, in that."""
    if not num_inputs:
        return 0
    is_pruned = METHODS[options.method].pruning is not Pruning.NONE
    bits = num_inputs * dense_bytes(site) // _FLOAT // 8 if is_pruned else 0
    return bits + _of_dense(site, options.svd_rank or max_rank, options, dtype) + _BESIDE


def _of_dense(site: Site, rank: int, options: MergeOptions, dtype: torch.dtype) -> int:
    short, long = sorted((site.in_features, site.out_features))
    if options.svd_clamp:
        return int(_WHOLE * max(short * long, 1 << 19)) * _FLOAT
    square, block = short * short, min(block_elements(short, long), short * long)
    if options.max_error or not finds_leading(short, rank):
        return max(int(_ALL_VECTORS * square), int(_GRAM * square) + block) * _DOUBLE + block * _FLOAT
    width, copied = width_of(rank), 0 if dtype is torch.float32 else block * _FLOAT
    vectors = short * -(-width // BLOCK_COLUMNS) * BLOCK_COLUMNS
    iterated = (int(_GRAM * square) + max(block, _VECTORS * vectors)) * dtype.itemsize + copied
    basis = short * width * dtype.itemsize
    proven = (_PROVEN * short + _SMALL * width) * width * _DOUBLE
    return max(iterated, width * long * _FLOAT + max(block * _FLOAT + copied + 2 * basis, proven))
