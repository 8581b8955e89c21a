"""From a router's directory to what chooses: checked against the base, its table made. For a loader thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.reading.source import AdapterDir
from loraplex.adapters.routing.chooser import Chooser
from loraplex.adapters.routing.files import ARROW, KIND, RouterBase, RouterFile, read_router
from loraplex.adapters.routing.token_space import TokenSpace, embedding_site
from loraplex.adapters.uid import UID_HEX_DIGITS
from loraplex.errors import Mismatch, OverCapacity
from loraplex.types import Coverage


@dataclass(frozen=True, slots=True)
class RoutedBase:
    """The base as routers are held against it. ``vocabulary`` gives the digest of its tokenizer's tokens and ids, empty
    without one."""

    view: BaseView
    vocabulary: Callable[[], str]

    def known_as(self) -> RouterBase:
        """What a router that is made on it says of it."""
        site = embedding_site(self.view)
        return RouterBase(site.out_features, self.view.vocab_size, self.vocabulary())


def load_router(directory: AdapterDir, base: RoutedBase, *, max_bytes: int) -> AdapterFacts:
    """The router in ``directory``, ready to choose. Its facts are those of an adapter that takes no adapter memory.

    Raises:
        InvalidAdapter, OverCapacity: as ``read_router`` does.
        Mismatch: it was made on another base.
        UnsupportedFeature: the base's first layer has no inputs that could be compared.
    """
    file, digest = read_router(directory, max_bytes=max_bytes)
    chooser = chooser_of(file, base, directory.shown, max_bytes=max_bytes)
    return AdapterFacts(
        uid=digest[:UID_HEX_DIGITS],
        kind=KIND,
        max_rank=0,
        num_parameters=sum(each.numel() for each in file.prototypes),
        nbytes=0,
        coverage=Coverage({}, {}),
        chooser=chooser,
    )


def chooser_of(file: RouterFile, base: RoutedBase, where: str, *, max_bytes: int) -> Chooser:
    """What chooses as ``file`` says, which ``where`` names. Its table may take ``max_bytes``.

    A token's score is its vector's cosine with a prototype (``centroid``), or the length of its vector's projection
    onto the space of an adapter's prototypes (``arrow``; of one prototype v that is ``|v . x|``).
    """
    _check_base(file, base, where)
    widths = (1,) * len(file.prototypes) if file.info.feature == ARROW else file.info.num_prototypes
    nbytes = 4 * base.view.vocab_size * sum(widths)
    if nbytes > max_bytes:
        raise OverCapacity(
            f"{where}: its table of {base.view.vocab_size} tokens and {sum(widths)} prototypes takes {nbytes} bytes; "
            f"at most {max_bytes} are allowed (max_adapter_bytes)"
        )
    table = np.empty((base.view.vocab_size, sum(widths)), np.float32)
    done = 0
    for block in TokenSpace(base.view, file.info.feature).blocks():
        table[done : done + len(block)] = _scores(block, file).numpy()
        done += len(block)
    assert done == len(table)
    return Chooser(file.info, widths, table)


def _scores(vectors: torch.Tensor, file: RouterFile) -> torch.Tensor:
    """``[n, widths]`` of unit vectors ``[n, H]``."""
    if file.info.feature == ARROW:
        projected = [(vectors @ torch.linalg.qr(each.T).Q).norm(dim=1) for each in file.prototypes]
        return torch.stack(projected, dim=1)
    return vectors @ torch.cat(file.prototypes).T


def _check_base(file: RouterFile, base: RoutedBase, where: str) -> None:
    made_on, here = file.base, base.known_as()
    for what, theirs, ours in (
        ("hidden size", made_on.hidden_size, here.hidden_size),
        ("vocabulary size", made_on.vocab_size, here.vocab_size),
    ):
        if theirs != ours:
            raise Mismatch(f"{where} is a router of another base: its {what} is {theirs}, this base's is {ours}")
    if made_on.vocabulary and here.vocabulary and made_on.vocabulary != here.vocabulary:
        raise Mismatch(
            f"{where} is a router of another base: its vocabulary is {made_on.vocabulary[:12]}..., this base's is "
            f"{here.vocabulary[:12]}..."
        )
