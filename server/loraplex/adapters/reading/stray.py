"""Tensors that land nowhere: the refusal that names them."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.phrases import some
from loraplex.adapters.reading.tensors import PREFIX
from loraplex.errors import Mismatch


def refuse_stray(stray: Sequence[str], base: BaseView, where: str) -> None:
    """``stray`` are full names of tensors that nobody has taken. Raises Mismatch: there is one."""
    if stray:
        raise Mismatch(
            f"{where}: target {_module_of(stray[0])!r} matches no site: {len(stray)} tensors land nowhere: "
            f"{some(stray)}; the model has {base.modules()} in {len(base.sites)} sites"
        )


def _module_of(key: str) -> str:
    """The module's name in a stray tensor's key."""
    rest = key.removeprefix(PREFIX)
    for end in (".lora_", ".base_layer.", ".weight", ".bias"):
        rest = rest.split(end, 1)[0]
    return rest.rsplit(".", 1)[-1]
