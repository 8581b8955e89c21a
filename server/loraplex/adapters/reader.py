"""Adapters by their sources: what a load reads, and an export reads again. Runs in the loader's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.load import load_adapter
from loraplex.adapters.merging.read import MergeMeans, read_merged
from loraplex.adapters.merging.recipe import is_recipe
from loraplex.adapters.merging.team import Team
from loraplex.adapters.reading.source import AdapterDir, AdapterSources
from loraplex.adapters.routing.files import is_router
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.adapters.uid import uid_of
from loraplex.errors import InvalidAdapter
from loraplex.types import MergeReport


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """What reading takes: where sources may lie, the base that adapters are lowered against, their largest size, the
    kinds that there are, how their own text is read, and who merges."""

    sources: AdapterSources
    base: BaseView
    max_bytes: int
    kinds: KindRegistry
    texts: OwnTexts
    team: Team

    def read(self, source: str, give_way: Callable[[], None]) -> tuple[AdapterDelta, MergeReport | None]:
        """The adapter that a source stands for, a directory's or a merge's; of a merge also what it was made from.
        ``give_way`` is called between pieces of long work.

        Raises as ``AdapterSources.resolve``, ``load_adapter`` and ``read_merged`` do.
        """
        if not is_recipe(source):
            return self._named(source, give_way), None
        named = partial(self._named, give_way=give_way)
        return read_merged(source, MergeMeans(named, self.base, self.max_bytes, give_way, self.team))

    def uid(self, directory: AdapterDir, give_way: Callable[[], None]) -> str:
        """That of the adapter in a directory, whose tensors are not looked at. Raises as ``uid_of`` does."""
        return uid_of(directory, self.texts, self.kinds.also_known, give_way)

    def _named(self, source: str, give_way: Callable[[], None]) -> AdapterDelta:
        directory = self.sources.resolve(source)
        if is_router(directory):
            raise InvalidAdapter(f"{directory.shown} holds a router, and no adapter")
        return load_adapter(
            directory,
            self.base,
            max_bytes=self.max_bytes,
            kinds=self.kinds,
            texts=self.texts,
            give_way=give_way,
        )
