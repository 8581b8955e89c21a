"""The methods by which adapters are merged, by the names that PEFT gives them. No torch: front ends list them.

Each is a form (what is merged: the factors, their exact sum, or the dense changes) with what is done to the values
before they are added. The next method is an entry of ``METHODS``; one of another form is a file beside
``factor_wise.py``, and a line in ``merge.py``.

Sources: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; peft 0.21 tuners/lora/model.py ``add_weighted_adapter``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

#: how the majority's sign of a value is found: by the sum of the values, or by their number
MAJORITY_SIGN_METHODS: Final = ("total", "frequency")


class Form(enum.Enum):
    """What is merged at a site."""

    #: A with A and B with B
    FACTOR_WISE = enum.auto()
    #: the exact sum, as the factors side by side; compressed where that is asked for
    CAT = enum.auto()
    #: the dense changes, of which a truncated SVD is kept
    SVD = enum.auto()


class Pruning(enum.Enum):
    """Which of an input's values are kept."""

    NONE = enum.auto()
    #: the largest
    MAGNITUDE = enum.auto()
    #: random ones, enlarged by what is lost (DARE)
    RANDOM = enum.auto()


@dataclass(frozen=True, slots=True)
class Method:
    """``elects``: of every value only the inputs whose sign is the majority's are averaged (TIES)."""

    form: Form
    pruning: Pruning = Pruning.NONE
    elects: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether values are weighted and added, and nothing else is done to them."""
        return self.pruning is Pruning.NONE and not self.elects

    def is_dense(self, svd_clamp: float) -> bool:
        """Whether it goes through dense changes; a plain sum does where outliers are cut off."""
        return self.form is Form.SVD and (not self.is_sum or svd_clamp > 0)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it takes, by their names in ``MergeOptions``."""
        taken = {
            "density": self.pruning is not Pruning.NONE,
            "majority_sign_method": self.elects,
            "svd_rank": self.form is not Form.FACTOR_WISE,
            "svd_clamp": self.form is Form.SVD,
            "max_error": self.form is not Form.FACTOR_WISE,
            "seed": self.pruning is Pruning.RANDOM,
        }
        return tuple(name for name, is_taken in taken.items() if is_taken)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "linear": Method(Form.FACTOR_WISE),
        "cat": Method(Form.CAT),
        "svd": Method(Form.SVD),
        "ties": Method(Form.FACTOR_WISE, Pruning.MAGNITUDE, elects=True),
        "ties_svd": Method(Form.SVD, Pruning.MAGNITUDE, elects=True),
        "dare_linear": Method(Form.FACTOR_WISE, Pruning.RANDOM),
        "dare_linear_svd": Method(Form.SVD, Pruning.RANDOM),
        "dare_ties": Method(Form.FACTOR_WISE, Pruning.RANDOM, elects=True),
        "dare_ties_svd": Method(Form.SVD, Pruning.RANDOM, elects=True),
        "magnitude_prune": Method(Form.FACTOR_WISE, Pruning.MAGNITUDE),
        "magnitude_prune_svd": Method(Form.SVD, Pruning.MAGNITUDE),
    }
)
