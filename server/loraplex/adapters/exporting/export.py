"""An export from beginning to end, in pieces: checked, written, proved where it is a copy, and given its name.

A piece is a site, or some megabytes of a file: whoever runs them may do something else in between, or stop, and then
nothing is left. Runs in the loader's thread, which is the one that may ask other ranks for their part of the base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.exporting.destination import (
    ExportDirs,
    Partial,
    Place,
    check_space,
    making,
    opened,
    write_all,
)
from loraplex.adapters.exporting.lora_format import as_lora
from loraplex.adapters.exporting.merged_model import Config, Describe, MergedModel, plan_merged
from loraplex.adapters.exporting.shards import (
    INDEX,
    Shard,
    TensorPlan,
    header_of,
    in_shards,
    index_of,
    write_tensor,
)
from loraplex.adapters.exporting.text_files import TEXT_FILES, base_text_of, laid_over_base, text_of
from loraplex.adapters.merging.recipe import decode, is_recipe
from loraplex.adapters.reader import AdapterReader
from loraplex.adapters.reading.source import CONFIG_FILE, TENSOR_FILE, AdapterDir
from loraplex.errors import Mismatch
from loraplex.quant.written import WRITE_FORMATS
from loraplex.types import Export, ExportFormat, ExportProgress

RECIPE_FILE: Final = "merge_recipe.json"
DEFAULT_SHARD_BYTES: Final = 5 * 10**9
#: of a file that is copied, at a time
_PIECE_BYTES: Final = 1 << 20
_METADATA: Final = {"format": "pt"}

Pieces = Generator[ExportProgress, None, None]


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The base as it is on the disk: its directory, or the file that it is; what its config.json says, or would; the
    modules of a model with another one; and those whose matrices it has in the ``QuantFormat`` of a name."""

    path: Path
    config: Config
    describe: Describe
    held: Callable[[str], frozenset[str]]


class Exporter:
    """Writes adapters of one base, which ``reader`` reads again."""

    def __init__(self, dirs: ExportDirs, files: BaseFiles, reader: AdapterReader) -> None:
        self._dirs = dirs
        self._files = files
        self._reader = reader

    def pieces(self, export: Export, give_way: Callable[[], None]) -> Pieces:
        """Write one, and say after each piece how far it has come. Closed before its end, nothing of it is left.
        ``give_way`` is called while an adapter is read that takes long.

        Raises:
            InvalidRequest, NotPermitted, NotFound, AlreadyExists, OverCapacity, ConversionFailed: its destination.
            InvalidRequest: a matrix has sizes that the quantization has no blocks for.
            Mismatch: the adapter's source is no longer what was loaded.
            UnsupportedFeature: this adapter has no such form.
            What reading its source raises.
        """
        place = self._dirs.place(export.destination)
        with opened(place) as parent_fd:
            yield ExportProgress("reading the adapter", 0, 0, str(place.path))
            target = _Target(export, place, parent_fd, give_way)
            if export.format is ExportFormat.MERGED:
                yield from self._merged(target)
            elif is_recipe(export.source):
                yield from self._lora(target)
            else:
                yield from self._copy(target)

    def _copy(self, target: _Target) -> Pieces:
        """An adapter's own files. What was copied must be what was loaded, to the bit."""
        directory = self._reader.sources.resolve(target.export.source)
        names = [CONFIG_FILE, TENSOR_FILE, *(name for name in TEXT_FILES if directory.has(name))]
        total = sum(_size(directory, name) for name in names)
        check_space(target.place, target.parent_fd, total)
        with making(target.place, target.parent_fd) as partial:
            done = 0
            for name in names:
                for size in _copied(directory, name, partial):
                    done += size
                    yield target.progress("copying", done, total)
            yield target.progress("checking the copy", done, total)
            target.check_uid(self._reader.uid(partial.directory, target.give_way))
            partial.publish()
        yield target.progress("done", total, total)

    def _lora(self, target: _Target) -> Pieces:
        """What a merge came to, as a LoRA."""
        delta = self._read(target)
        lora = as_lora(delta, self._reader.base)
        plans = [TensorPlan(key, tuple(tensor.shape), tensor.dtype) for key, tensor in lora.tensors.items()]
        own = self._text_of_merge(target, delta)
        small = {**own, CONFIG_FILE: _json(lora.config), RECIPE_FILE: _recipe(target.export.source)}
        shards = (Shard(TENSOR_FILE, tuple(plans)),)
        total = yield from _write(target, shards, lora.tensors.items(), small)
        yield target.progress("done", total, total)

    def _merged(self, target: _Target) -> Pieces:
        """The base with the adapter in it."""
        delta, own = self._with_text(target)
        model = plan_merged(delta, self._reader.base, self._files.config, self._files.describe)
        if target.export.quantization:
            form = WRITE_FORMATS[target.export.quantization]()
            model = model.quantized(form, self._files.held(form.name))
        shards = in_shards(model.plans(), target.export.max_shard_bytes or DEFAULT_SHARD_BYTES)
        small = laid_over_base(own, base_text_of(self._files.path), delta)
        small["config.json"] = _json(model.config)
        if len(shards) > 1:
            small[INDEX] = index_of(shards)
        if is_recipe(target.export.source):
            small[RECIPE_FILE] = _recipe(target.export.source)
        total = yield from _write(target, shards, model.tensors(), small)
        yield _with_errors(target.progress("done", total, total), model)

    def _read(self, target: _Target) -> AdapterDelta:
        """The adapter as it was loaded. Raises Mismatch: its source has changed."""
        delta, _ = self._reader.read(target.export.source, target.give_way)
        target.check_uid(delta.uid)
        return delta

    def _with_text(self, target: _Target) -> tuple[AdapterDelta, dict[str, bytes]]:
        """The adapter, and the text files that it ships. Raises Mismatch: either has changed."""
        source = target.export.source
        if is_recipe(source):
            delta = self._read(target)
            return delta, self._text_of_merge(target, delta)
        own = text_of(self._reader.sources.resolve(source))
        delta = self._read(target)
        if own != text_of(self._reader.sources.resolve(source)):
            raise target.changed("its text files changed while they were read")
        return delta, own

    def _text_of_merge(self, target: _Target, delta: AdapterDelta) -> dict[str, bytes]:
        """The text files of an input that ships what the merge has, as all do that ship any; none where it has none.
        Raises Mismatch: no input does any more."""
        if delta.text is None:
            return {}
        vocab_size = delta.vocab_size or self._reader.base.vocab_size
        for source in _plain_sources(target.export.source):
            directory = self._reader.sources.resolve(source)
            own = text_of(directory)
            found = self._reader.texts.read(directory, vocab_size).own
            if found is not None and found.facts.digest == delta.text.facts.digest:
                return own
        raise target.changed("the text files of its inputs changed while they were read")


@dataclass(frozen=True, slots=True)
class _Target:
    """What is exported, and where to."""

    export: Export
    place: Place
    parent_fd: int
    give_way: Callable[[], None]

    def progress(self, stage: str, done: int, total: int) -> ExportProgress:
        return ExportProgress(stage, done, total, str(self.place.path))

    def check_uid(self, uid: str) -> None:
        """Raises Mismatch: that is another adapter."""
        if uid != self.export.uid:
            raise self.changed(f"it has uid {self.export.uid} as it is served, and {uid} as it is there now")

    def changed(self, how: str) -> Mismatch:
        return Mismatch(
            f"adapter {self.export.name!r}: its source {self.export.source[:200]!r} is no longer what was loaded: "
            f"{how}; load it again, then export it"
        )


def _write(
    target: _Target, shards: Sequence[Shard], tensors: Iterable[tuple[str, torch.Tensor]], small: dict[str, bytes]
) -> Generator[ExportProgress, None, int]:
    """Tensors in the order of the shards, then the small files. Returns the tensors' bytes."""
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    headers = [header_of(shard.tensors, _METADATA) for shard in shards]
    check_space(target.place, target.parent_fd, total + sum(map(len, headers)) + sum(map(len, small.values())))
    values, done = iter(tensors), 0
    with making(target.place, target.parent_fd) as partial:
        for shard, header in zip(shards, headers, strict=True):
            with partial.file(shard.file) as file:
                write_all(file, memoryview(header))
                for plan in shard.tensors:
                    key, tensor = next(values)
                    assert key == plan.key, f"{key} comes where {plan.key} was planned"
                    write_tensor(file, tensor, plan, target.give_way)
                    del tensor
                    done += plan.nbytes
                    yield target.progress("writing weights", done, total)
        for name, content in small.items():
            partial.write(name, content)
        partial.publish()
    return total


def _with_errors(progress: ExportProgress, model: MergedModel) -> ExportProgress:
    """``progress``, and what quantizing the model has lost."""
    if model.requantized is None:
        return progress
    site, largest = model.requantized.largest_error()
    mean = model.requantized.mean_error()
    return msgspec.structs.replace(progress, largest_error=largest, largest_error_site=site, mean_error=mean)


def _copied(directory: AdapterDir, name: str, partial: Partial) -> Generator[int, None, None]:
    """Copy a file, and say how many bytes each piece was."""
    with directory.open(name) as fd, partial.file(name) as file:
        while piece := os.read(fd, _PIECE_BYTES):
            write_all(file, memoryview(piece))
            yield len(piece)


def _size(directory: AdapterDir, name: str) -> int:
    with directory.open(name) as fd:
        return os.fstat(fd).st_size


def _plain_sources(source: str) -> Iterator[str]:
    """The directories that a merge was made from, those of merges among its inputs too."""
    if not is_recipe(source):
        yield source
        return
    for each in decode(source).inputs:
        yield from _plain_sources(each.source)


def _recipe(source: str) -> bytes:
    """What a merge was made from, for people and for whoever makes it again."""
    return msgspec.json.format(msgspec.json.encode(decode(source)), indent=2) + b"\n"


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=False).encode() + b"\n"
