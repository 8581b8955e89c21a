"""Whether a lowered adapter does anything: one that changes nothing was not trained, or not saved right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.saved.own_rows import Whole, changes
from loraplex.errors import InvalidAdapter

#: how far a scale may be from 1 by rounding alone (a DoRA's quotient of two norms)
_ROUNDING: Final = 1e-6
#: in a tensor file's metadata: the adapter says of itself that it changes nothing
IDENTITY_KEY: Final = "loraplex.identity"


def says_identity(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that its adapter changes nothing."""
    return metadata.get(IDENTITY_KEY) == "true"


def check_effect(sites: Mapping[str, SiteDelta], base: BaseView, where: str) -> None:
    """Raises InvalidAdapter: every change is one by nothing. Asks for the base's weights last."""
    if any(_scales(delta) or _multiplies(delta.low_rank) for delta in sites.values()):
        return
    for name, delta in sites.items():
        if delta.rows is not None and changes(delta.rows, Whole(base.weight(name), base.bias(name))):
            return
    hint = f'(one that is meant to be so has {{"{IDENTITY_KEY}": "true"}} in its __metadata__)'
    raise InvalidAdapter(f"{where}: the adapter changes nothing: {_why(sites)} {hint}")


def _why(sites: Mapping[str, SiteDelta]) -> str:
    pairs = [delta.low_rank for delta in sites.values() if delta.low_rank is not None]
    if not sites:
        return "all that it holds equals the base model"
    if len(pairs) < len(sites):
        return f"at all of its {len(sites)} sites its values equal the base model's"
    return (
        "every lora_B is zero" if not any(_any(pair.b) for pair in pairs) else "at every site lora_A or lora_B is zero"
    )


def _scales(delta: SiteDelta) -> bool:
    scales = (scale for scale in (delta.out_scale, delta.in_scale) if scale is not None)
    return any(bool(((scale - 1).abs() > _ROUNDING).any()) for scale in scales) or (
        delta.shift is not None and _any(delta.shift)
    )


def _multiplies(low_rank: LowRank | None) -> bool:
    return low_rank is not None and _any(low_rank.a) and _any(low_rank.b)


def _any(tensor: torch.Tensor) -> bool:
    return bool(tensor.any())
