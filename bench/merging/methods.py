"""The merges that are measured: each method, and those of its options that make it another computation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from loraplex.adapters.merging.methods import METHODS, Form
from loraplex.types import MergeOptions

#: of the inputs; no two alike
WEIGHTS: Final = (0.6, 0.5, 0.4, 0.3)
#: ranks of the inputs
EQUAL_RANKS: Final = (16, 16, 16, 16)
DENSITY: Final = 0.5
#: what a method is measured with beside its defaults
_ALSO: Final[dict[str, tuple[dict[str, float], ...]]] = {
    "cat": ({"svd_rank": 16}, {"max_error": 0.1}),
    "svd": ({"svd_clamp": 0.99},),
    "ties_svd": ({"svd_clamp": 0.99},),
}


def merges_of(methods: Iterable[str] = tuple(METHODS)) -> dict[str, MergeOptions]:
    """The merges of these methods, by names such as ``cat svd_rank=16``."""
    return {
        " ".join((method, *(f"{name}={value}" for name, value in also.items()))): _options(method, also)
        for method in methods
        for also in ({}, *_ALSO.get(method, ()))
    }


def _options(method: str, also: dict[str, float]) -> MergeOptions:
    density = DENSITY if "density" in METHODS[method].options else 0.0
    return MergeOptions(method, density=density, **also)  # type: ignore[arg-type]


def through_dense(merges: Mapping[str, MergeOptions]) -> dict[str, MergeOptions]:
    """Those that go through dense changes, whose cost depends on what is merged; but for LAPACK's, which does not."""
    return {
        name: options
        for name, options in merges.items()
        if METHODS[options.method].is_dense(options.svd_clamp) and not options.svd_clamp
    }


def is_factored(options: MergeOptions) -> bool:
    """Whether it is the exact sum, or what is kept of it by way of its factors: no dense matrix is to be formed."""
    method = METHODS[options.method]
    return method.form is not Form.FACTOR_WISE and not method.is_dense(options.svd_clamp)
