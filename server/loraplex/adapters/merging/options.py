"""What may be asked of a merge, checked before anything is read. No torch: front ends refuse with it, too."""

from __future__ import annotations

from typing import Final

from loraplex.adapters.merging.methods import MAJORITY_SIGN_METHODS, METHODS, Method
from loraplex.errors import InvalidRequest
from loraplex.types import MergeOptions

_MAX_SVD_RANK: Final = (1 << 16) - 1
_MAX_SEED: Final = (1 << 64) - 1


def check_options(options: MergeOptions) -> Method:
    """The method that is asked for.

    Raises InvalidRequest naming the option: an unknown method, a value outside its range, an option that the method
    does not take or lacks, or two that contradict each other.
    """
    method = METHODS.get(options.method)
    if method is None:
        raise refusal("method", f"{options.method[:64]!r} is unknown; there are {', '.join(METHODS)}")
    _check_ranges(options)
    _check_use(options, method)
    if "density" in method.options and not options.density:
        raise refusal("density", f"is missing: {options.method!r} needs it; allowed is above 0, up to 1")
    if options.max_error:
        for name in ("svd_rank", "svd_clamp"):
            if value := getattr(options, name):
                raise refusal(
                    name, f"{value} and max_error {options.max_error} exclude each other: max_error chooses the ranks"
                )
    return method


def refusal(field: str, what: str) -> InvalidRequest:
    """What refuses a merge; ``what`` is said of ``field``."""
    return InvalidRequest(f"merge: {field} {what}", field=field)


def _check_ranges(options: MergeOptions) -> None:
    majority = options.majority_sign_method
    if majority not in MAJORITY_SIGN_METHODS:
        raise refusal(
            "majority_sign_method", f"{majority[:64]!r} is unknown; there are {', '.join(MAJORITY_SIGN_METHODS)}"
        )
    for name, lowest, highest in (
        ("density", 0, 1),
        ("svd_rank", 0, _MAX_SVD_RANK),
        ("svd_clamp", 0, 1),
        ("max_error", 0, 1),
        ("seed", 0, _MAX_SEED),
    ):
        value = getattr(options, name)
        if not lowest <= value <= highest:  # nor is NaN
            raise refusal(name, f"{value} is outside its range; allowed is {lowest} to {highest}")


def _check_use(options: MergeOptions, method: Method) -> None:
    """Options that are left out have their defaults. A density of 1 prunes nothing, as the others do."""
    defaults = MergeOptions(options.method)
    for name in MergeOptions.__struct_fields__:
        value = getattr(options, name)
        is_left_out = value == getattr(defaults, name) or (name, value) == ("density", 1)
        if name == "method" or is_left_out or name in method.options:
            continue
        taking = ", ".join(other for other in METHODS if name in METHODS[other].options)
        raise refusal(name, f"{value} has no use in {options.method!r}; it is taken by {taking}")
