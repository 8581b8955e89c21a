"""How much memory a merge or an export takes at its height, beside what is given and what comes of it, in dense float32
matrices of one site.

Merges go through the function that a loader's thread calls, of adapters that are read: of all their sites by one
thread, as beside requests; and site by site, of which those two that may be merged at once on an idle server are added
that take the most. What a site of trained adapters takes hangs on their values, so all of theirs are gone through. Then
one site of a real model's size, beside which blocks and factors are small. Where no dense matrix is to be formed, the
largest tensor of a site is held against the site's matrix too. The export of a merge, or of a model, reads its adapters
again, and they are what is given to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from bench.engine.record import Measure
from bench.merging.large_site import large_site
from bench.merging.methods import WEIGHTS, is_factored, through_dense
from bench.merging.peak import heap_set_aside, peak_of
from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.exporting.destination import ExportDirs
from loraplex.adapters.exporting.export import BaseFiles, Exporter
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.merging.merge import merge
from loraplex.adapters.merging.recipe import encode
from loraplex.adapters.merging.sums import Input
from loraplex.adapters.merging.team import Task, Team
from loraplex.adapters.reader import AdapterReader
from loraplex.adapters.reading.source import AdapterSources
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.config import Config, ModelConfig
from loraplex.engine.rank import load_rank
from loraplex.models.loader import held_modules, plan_model
from loraplex.models.registry import describe
from loraplex.models.sites import Site
from loraplex.parallel.group import solo
from loraplex.types import Export, ExportFormat, MergeInput, MergeOptions, MergeRecipe

#: dense matrices of a site beside the result, at most
MOST: Final = 1.0
#: where no dense matrix is to be formed: in all, and of any single tensor, in matrices of its own site
MOST_FACTORED: Final = 0.1
MOST_OF_TENSOR: Final = 0.9
_UNIT: Final = "matrices"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``merges`` by name, each of all ``adapters``, of which the first is exported; and of all ``trained`` ones, if
    there are any, where it goes through dense changes. ``large_shape``: ``[out, in]`` of the large site."""

    model_dir: Path
    dtype: str
    adapters: dict[str, Path]
    trained: dict[str, Path]
    merges: Mapping[str, MergeOptions]
    large_shape: tuple[int, int]

    @property
    def of_trained(self) -> dict[str, MergeOptions]:
        return through_dense(self.merges) if self.trained else {}

    @property
    def at_large(self) -> dict[str, MergeOptions]:
        """All but those that LAPACK works at for many minutes."""
        return {name: options for name, options in self.merges.items() if not options.svd_clamp}

    @property
    def num_turns(self) -> int:
        return len(self.merges) + len(self.of_trained) + len(self.at_large) + len(_EXPORTS)


def memory(plan: MemoryPlan, folder: Path, on_turn: Callable[[str], None]) -> Iterator[Measure]:
    """Each merge, at the large site too, then each export. ``on_turn`` is told of each before it begins."""
    out = folder / "made"
    out.mkdir()
    threads = torch.get_num_threads()
    means = _Means.of(plan, out)
    torch.set_num_threads(1)  # as the loader's thread has it
    try:
        with heap_set_aside():
            yield from _each(plan, means, on_turn)
    finally:
        torch.set_num_threads(threads)
        means.reader.team.close()


def _each(plan: MemoryPlan, means: _Means, on_turn: Callable[[str], None]) -> Iterator[Measure]:
    for name, options in plan.merges.items():
        on_turn(f"merge {name}")
        yield from _of_merge(name, options, means)
    for name, options in plan.of_trained.items():
        on_turn(f"merge {name}, trained")
        yield _of_trained(name, options, means)
    base, inputs = large_site(plan.large_shape)
    for name, options in plan.at_large.items():
        on_turn(f"merge {name}, a large site")
        yield _at_large(name, options, base, inputs)
    for name, exported in _EXPORTS.items():
        on_turn(f"export {name}")
        yield _of_export(name, exported(means), means)


@dataclass(frozen=True, slots=True)
class _Means:
    """Adapters that are read, by their sources, and with their weights; what read them, and what exports them."""

    sources: tuple[str, ...]
    inputs: tuple[Input, ...]
    trained: tuple[Input, ...]
    reader: AdapterReader
    exporter: Exporter

    @staticmethod
    def of(plan: MemoryPlan, out: Path) -> _Means:
        config = Config(model=ModelConfig(model=str(plan.model_dir), device="cpu", dtype=plan.dtype))
        planned = plan_model(plan.model_dir, config.model)
        base = view_of(load_rank(config, planned, solo(), lambda stage, done, total: None).model)
        texts = OwnTexts(BaseText.read(plan.model_dir, ()), allow_templates=False)
        paths = *plan.adapters.values(), *plan.trained.values()
        sources, max_bytes = AdapterSources([], paths), config.adapters.max_adapter_bytes
        reader = AdapterReader(sources, base, max_bytes, KindRegistry(), texts, Team())
        files = BaseFiles(plan.model_dir, planned.config, describe, partial(held_modules, planned))
        own, trained = _read(plan.adapters, reader), _read(plan.trained, reader)
        exporter = Exporter(ExportDirs([out]), files, reader)
        return _Means(tuple(map(str, plan.adapters.values())), own, trained, reader, exporter)

    @property
    def base(self) -> BaseView:
        return self.reader.base

    @property
    def touched(self) -> Site:
        """The largest site that the adapters change."""
        return max((site for site in self.base.sites if site.name in self.inputs[0][0].sites), key=_matrix_bytes)


def _read(adapters: Mapping[str, Path], reader: AdapterReader) -> tuple[Input, ...]:
    weighted = zip(adapters.values(), WEIGHTS[: len(adapters)], strict=True)
    return tuple((reader.read(str(path), _go_on)[0], weight) for path, weight in weighted)


class _EachAlone(Team):
    """Does one task after another, and notes what each takes at its height beside what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[tuple[int, int]] = []
        self._blocks: list[int] = []
        self._room: int | None = None
        self._claimed = 0

    def claim(self, num_bytes: int) -> None:
        self._claimed = num_bytes

    def in_order(self, tasks: Iterable[Task[SiteDelta]], room: int | None) -> Generator[SiteDelta, None, None]:
        self._room = room
        for task in tasks:
            self._claimed = task.num_bytes
            change, peak = peak_of(task.run)
            self._taken.append((self._claimed, peak.total - change.nbytes))
            self._blocks.append(peak.largest)
            yield change

    @property
    def most(self) -> int:
        """Of one of them."""
        return max(taken for _, taken in self._taken)

    def largest_part(self, sites: Sequence[Site]) -> float:
        """How large a tensor was, at most, in matrices of its site, which are the tasks' in order."""
        return max(block / _matrix_bytes(site) for block, site in zip(self._blocks, sites, strict=True))

    @property
    def most_at_once(self) -> int:
        """Of one of them, or of two that have room together."""
        if (room := self._room) is None:
            return self.most
        pairs = itertools.combinations(self._taken, 2)
        both = [ours + theirs for (one, ours), (other, theirs) in pairs if one + other <= room]
        return max([self.most, *both])


def _of_merge(name: str, options: MergeOptions, means: _Means) -> Iterator[Measure]:
    changed = [site for site in means.base.sites if site.name in means.inputs[0][0].sites]
    sites = changed[: 2 * len({site.module for site in changed})]  # two of each kind
    some = [
        (replace(delta, sites={site.name: delta.sites[site.name] for site in sites}), weight)
        for delta, weight in means.inputs
    ]
    each = _each_alone(some, options, means.base)
    yield _peak(name, options, means.inputs, each, means)
    if is_factored(options):
        yield Measure(f"largest tensor of merge {name}", each.largest_part(sites), _UNIT, MOST_OF_TENSOR)


def _of_trained(name: str, options: MergeOptions, means: _Means) -> Measure:
    each = _each_alone(means.trained, options, means.base)
    return _peak(f"{name}, trained", options, means.trained, each, means)


def _each_alone(inputs: Sequence[Input], options: MergeOptions, base: BaseView) -> _EachAlone:
    merge(inputs, options, base)  # what is compiled once is no part of it
    each = _EachAlone()
    merge(inputs, options, base, team=each)
    return each


def _peak(name: str, options: MergeOptions, inputs: Sequence[Input], each: _EachAlone, means: _Means) -> Measure:
    alone = _merge_bytes(inputs, options, means.base)
    taken = max(alone, each.most_at_once + max(alone - each.most, 0))
    detail = f"{taken / 1e6:.2f} MB, of one thread {alone / 1e6:.2f}"
    return Measure(f"peak of merge {name}", taken / _matrix_bytes(means.touched), _UNIT, _most(options), detail)


def _at_large(name: str, options: MergeOptions, base: BaseView, inputs: Sequence[Input]) -> Measure:
    (site,), taken = base.sites, _merge_bytes(inputs, options, base)
    shape = f"{site.out_features} x {site.in_features}"
    label = f"peak of merge {name}, {shape}"
    return Measure(label, taken / _matrix_bytes(site), _UNIT, _most(options), f"{taken / 1e6:.2f} MB")


def _most(options: MergeOptions) -> float:
    return MOST_FACTORED if is_factored(options) else MOST


def _merge_bytes(inputs: Sequence[Input], options: MergeOptions, base: BaseView) -> int:
    merged, peak = peak_of(lambda: merge(inputs, options, base))
    return peak.total - merged.delta.nbytes


@dataclass(frozen=True, slots=True)
class _Exported:
    """What is exported. ``given_bytes``: of the adapters that it reads; ``site``: the largest that it writes."""

    source: str
    uid: str
    format: ExportFormat
    given_bytes: int
    site: Site


def _own_files(means: _Means) -> _Exported:
    delta, _ = means.inputs[0]
    return _Exported(means.sources[0], delta.uid, ExportFormat.PEFT, 0, means.touched)


def _merge_as_lora(means: _Means) -> _Exported:
    options = MergeOptions("cat")
    named = enumerate(zip(means.sources, means.inputs, strict=True))
    inputs = (MergeInput(f"a{place}", source, delta.uid, weight) for place, (source, (delta, weight)) in named)
    merged = merge(means.inputs, options, means.base).delta
    given = sum(delta.nbytes for delta, _ in means.inputs) + merged.nbytes
    source = encode(MergeRecipe(tuple(inputs), options))
    return _Exported(source, merged.uid, ExportFormat.PEFT, given, means.touched)


def _model(means: _Means) -> _Exported:
    delta, _ = means.inputs[0]
    largest = max((site for site in means.base.sites if site.has_matrix), key=_matrix_bytes)
    return _Exported(means.sources[0], delta.uid, ExportFormat.MERGED, delta.nbytes, largest)


_EXPORTS: Final[Mapping[str, Callable[[_Means], _Exported]]] = {
    "peft": _own_files,
    "peft, a merge": _merge_as_lora,
    "merged": _model,
}


def _of_export(name: str, exported: _Exported, means: _Means) -> Measure:
    export = Export("a", exported.source, exported.uid, name.replace(", ", "-"), exported.format)

    def work() -> None:
        for _ in means.exporter.pieces(export, _go_on):
            pass

    _, peak = peak_of(work)
    beside, site = peak.total - exported.given_bytes, exported.site
    detail = f"{beside / 1e6:.2f} MB; a matrix of {site.module}"
    return Measure(f"peak of export {name}", beside / _matrix_bytes(site), _UNIT, MOST, detail)


def _matrix_bytes(site: Site) -> int:
    return site.out_features * site.in_features * torch.float32.itemsize


def _go_on() -> None:
    return None  # nothing else waits
