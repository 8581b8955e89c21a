"""New routers: prototypes learnt from example prompts, or read off the adapters themselves. For tools, not for servers.

``centroid``: the mean of an adapter's example prompts, each the mean of its tokens' vectors; or several means, by
spherical k-means. ``arrow``: the directions of a token's vector that the adapter's change of the first layer's inputs
amplifies most: the top right singular vectors of ``scale * B A``, stacked over the sites that read this input
(Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", at one layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.routing.chooser import Chooser, softmax
from loraplex.adapters.routing.files import (
    ARROW,
    CENTROID,
    MAX_PROTOTYPES,
    MIN_TEMPERATURE,
    RouterFile,
    check_names,
)
from loraplex.adapters.routing.load import RoutedBase, chooser_of
from loraplex.adapters.routing.token_space import TokenSpace, first_layer
from loraplex.errors import InvalidRequest, UnsupportedFeature
from loraplex.types import RouterInfo

Prompts = Mapping[str, Sequence[Sequence[int]]]
"""Adapter name -> token ids of prompts that are for it, each of one or more."""

#: where there are no examples that would tell; scores of prompts differ by some hundredths
DEFAULT_TEMPERATURE: Final = 0.02
#: temperatures that are tried on the examples
_TEMPERATURES: Final = tuple(float(t) for t in np.geomspace(1e-4, 1.0, 81))
#: of k-means, which is done long before
_MAX_ROUNDS: Final = 100
_SEED: Final = 0

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a router is to be. ``num_prototypes``: of each adapter, at most. ``temperature`` 0: the one that makes the
    examples likeliest; without examples ``DEFAULT_TEMPERATURE``."""

    num_prototypes: int = 1
    temperature: float = 0.0
    threshold: float = 0.0
    default: str = ""

    def check(self) -> None:
        """Raises InvalidRequest naming the field."""
        if not 0 < self.num_prototypes <= MAX_PROTOTYPES:
            raise InvalidRequest(f"prototypes: {self.num_prototypes}; allowed are 1 to {MAX_PROTOTYPES}")
        if self.temperature and not self.temperature >= MIN_TEMPERATURE:
            raise InvalidRequest(f"temperature: {self.temperature:g}; at least {MIN_TEMPERATURE:g} is allowed")
        if not 0 <= self.threshold <= 1:
            raise InvalidRequest(f"threshold: {self.threshold:g}; allowed are 0 to 1")


def centroid_router(prompts: Prompts, wanted: Wanted, base: RoutedBase, on_progress: OnProgress) -> RouterFile:
    """A router that compares prompts with examples.

    Raises InvalidRequest: no examples, or values that ``wanted`` may not have.
    """
    wanted.check()
    space = TokenSpace(base.view, CENTROID)
    prototypes = []
    for done, (name, examples) in enumerate(prompts.items()):
        on_progress("prototypes", done, len(prompts))
        if not examples:
            raise InvalidRequest(f"examples: there are none for {name!r}", field="examples")
        features = torch.stack([space.vectors(torch.tensor(each)).mean(dim=0) for each in examples])
        prototypes.append(spherical_means(features, wanted.num_prototypes))
    return _router(CENTROID, tuple(prompts), prototypes, prompts, wanted, base)


def arrow_router(
    adapters: Mapping[str, AdapterDelta], prompts: Prompts, wanted: Wanted, base: RoutedBase, on_progress: OnProgress
) -> RouterFile:
    """A router that compares prompts with what adapters amplify; ``prompts`` may be empty, and set the temperature.

    Raises:
        InvalidRequest: values that ``wanted`` may not have.
        UnsupportedFeature: an adapter has no low-rank change of the first layer's inputs.
    """
    wanted.check()
    prototypes = []
    for done, (name, delta) in enumerate(adapters.items()):
        on_progress("prototypes", done, len(adapters))
        prototypes.append(top_directions(name, delta, base.view, wanted.num_prototypes))
    return _router(ARROW, tuple(adapters), prototypes, prompts, wanted, base)


def spherical_means(features: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` unit vectors ``[k, H]`` that features ``[n, H]`` gather around, by cosine.

    Lloyd's rounds from seeds that are far from each other, the first drawn with a fixed seed. Deterministic.
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    if count == 1:
        return torch.nn.functional.normalize(features.mean(dim=0, keepdim=True), dim=1)
    generator = torch.Generator().manual_seed(_SEED)
    seeds = [int(torch.randint(len(unit), (1,), generator=generator))]
    while len(seeds) < count:
        nearest = (unit @ unit[seeds].T).amax(dim=1)
        if float(nearest.min()) > 1 - 1e-6:
            break  # no more different ones
        seeds.append(int(nearest.argmin()))
    means, owners = unit[seeds], torch.full((len(unit),), -1)
    for _ in range(_MAX_ROUNDS):
        now = (unit @ means.T).argmax(dim=1)
        if torch.equal(now, owners):
            break
        owners = now
        sums = torch.zeros_like(means).index_add_(0, owners, unit)
        kept = sums.norm(dim=1) > 0  # one that nobody is nearest to is left out
        means = torch.nn.functional.normalize(sums[kept], dim=1)
        owners = owners if bool(kept.all()) else torch.full_like(owners, -1)
    return means


def top_directions(name: str, delta: AdapterDelta, base: BaseView, count: int) -> torch.Tensor:
    """The ``count`` right singular vectors ``[k, H]`` of largest singular value; fewer where the rank is less.

    With ``B_i = Q_i R_i``, the stacked ``scale_i B_i A_i`` have the right singular vectors of the stacked ``R_i A_i``,
    which have only as many rows as ranks: the dense matrix is never formed.
    """
    layer = first_layer(base)
    small = []
    for site in layer.inputs:
        change = delta.sites.get(site.name)
        factors = None if change is None else change.factors()
        if factors is not None:
            a, b = factors
            small.append(torch.linalg.qr(b.double()).R @ a.double())
    if not small:
        inputs = ", ".join(site.name for site in layer.inputs)
        raise UnsupportedFeature(
            f"adapter {name!r} has no low-rank change of the first layer's inputs ({inputs}), so that feature "
            f"{ARROW!r} has nothing to compare; {CENTROID!r} learns from example prompts",
            field="feature",
        )
    _, values, vectors = torch.linalg.svd(torch.cat(small), full_matrices=False)
    significant = int((values > values[0] * 1e-6).sum())
    if not values[0] > 0:
        raise UnsupportedFeature(f"adapter {name!r} changes nothing of the first layer's inputs", field="feature")
    top: torch.Tensor = vectors[: min(count, significant)].float()
    return top


def _router(
    feature: str,
    names: Sequence[str],
    prototypes: Sequence[torch.Tensor],
    prompts: Prompts,
    wanted: Wanted,
    base: RoutedBase,
) -> RouterFile:
    counts = tuple(len(each) for each in prototypes)
    temperature = wanted.temperature or DEFAULT_TEMPERATURE
    info = RouterInfo(feature, check_names(names), counts, temperature, wanted.threshold, wanted.default)
    file = RouterFile(info, base.known_as(), tuple(prototypes))
    if wanted.temperature or not prompts:
        return file
    chooser = chooser_of(file, base, "the new router", max_bytes=1 << 62)
    return replace(file, info=msgspec.structs.replace(info, temperature=likeliest_temperature(chooser, prompts)))


def likeliest_temperature(chooser: Chooser, prompts: Prompts) -> float:
    """The temperature under which each prompt's own adapter is most probable, by the mean log probability."""
    names = chooser.info.adapters
    labelled = [(names.index(name), ids) for name, examples in prompts.items() for ids in examples]
    scores = np.stack([chooser.scores(ids) for _, ids in labelled])
    labels = np.array([label for label, _ in labelled])

    def mean_log(temperature: float) -> float:
        probable = softmax(scores, temperature)[np.arange(len(labels)), labels]
        return float(np.log(np.maximum(probable, 1e-12)).mean())

    return max(_TEMPERATURES, key=mean_log)
