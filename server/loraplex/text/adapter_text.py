"""Which tokenizer, vocabulary, stop tokens and sampling defaults the requests of each adapter are served with.

Follows the adapters' changes as the engine tells them, and opens what the engine has spooled of their own text: when it
is asked for, in threads of its own, once for all adapters with the same. Knows no requests.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex.errors import InvalidRequest, Unavailable
from loraplex.text.pack import pack_file, read_pack
from loraplex.text.threads import LooseThreads
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import AdapterInfo, AdapterState, ModelInfo, OwnText, SamplingParams

#: tokenizers kept open; those that share the base's vocabulary are small
_MAX_OPEN: Final = 64
_THREADS: Final = 8
#: a spooled file that is gone belonged to a version that has just ended: its end is told by then
_GONE_S: Final = 0.02
_MAX_GONE: Final = 50


@dataclass(frozen=True, slots=True)
class RequestText:
    """What a request with certain adapters is tokenized, checked and stopped with. ``digest``: of the adapters' own
    text, empty for the base's; ``sampling``: defaults that its one adapter ships.
    """

    tokenizer: Tokenizer
    digest: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingParams | None = None


class AdapterTexts:
    """Owned by the front end's event loop. ``spool``: where the engine keeps adapters' own text."""

    def __init__(self, base: Tokenizer, model: ModelInfo, spool: Path) -> None:
        self._base = base
        self._model = model
        self._spool = spool
        self._ready: dict[str, AdapterInfo] = {}
        self._loading: dict[str, asyncio.Event] = {}
        self._open: OrderedDict[str, asyncio.Task[Tokenizer]] = OrderedDict()
        self._threads = LooseThreads(_THREADS, "adapter-text")

    def changed(self, info: AdapterInfo) -> None:
        """An adapter entered a state."""
        present = self._ready.get(info.name)
        if info.state is AdapterState.LOADING:
            if present is None:
                self._loading.setdefault(info.name, asyncio.Event())
            return
        if info.state is AdapterState.READY:
            self._ready[info.name] = info
        elif present is not None and info.generation == present.generation:
            del self._ready[info.name]  # it drains or is gone; a failed load, generation 0, leaves the version before
        if info.state in (AdapterState.READY, AdapterState.FAILED) and info.name in self._loading:
            self._loading.pop(info.name).set()

    async def of(self, names: Sequence[str]) -> RequestText:
        """What a request that names these adapters is served with; waits for first loads in progress.

        Names that nobody knows count as the base model: refusing them is the engine's.

        Raises:
            InvalidRequest: several ship text of their own, and not the same.
            Unavailable: an adapter's text went away meanwhile, and nothing told of its end.
        """
        for _ in range(_MAX_GONE):
            while waiting := [self._loading[name] for name in names if name in self._loading]:
                await waiting[0].wait()
            infos = [self._ready[name] for name in names if name in self._ready]
            own = _one_of(infos)
            try:
                tokenizer = self._base if own is None else await self._tokenizer(own.digest)
            except FileNotFoundError:
                await asyncio.sleep(_GONE_S)
                continue
            eos = None if own is None else own.eos_token_ids
            return RequestText(
                tokenizer=tokenizer,
                digest="" if own is None else own.digest,
                vocab_size=max((self._model.vocab_size, *(info.vocab_size for info in infos))),
                eos_token_ids=self._model.eos_token_ids if eos is None else eos,
                sampling=own.sampling if own is not None and len(names) == 1 else None,
            )
        raise Unavailable(f"the text of {', '.join(map(repr, names))} went away; ask again", retry_after_s=_GONE_S)

    def engine_ended(self) -> None:
        """Nothing is loaded any more, and no load will end: nobody waits for one."""
        self._ready.clear()
        for event in self._loading.values():
            event.set()
        self._loading.clear()

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _tokenizer(self, digest: str) -> Tokenizer:
        """The tokenizer of one digest, opened once however many ask. Raises FileNotFoundError, InvalidModel."""
        task = self._open.get(digest)
        if task is None:
            task = self._open[digest] = asyncio.create_task(self._read(digest))
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(digest)
        try:
            return await asyncio.shield(task)  # one caller that goes away does not take it from the others
        finally:
            if task.done() and (task.cancelled() or task.exception()) and self._open.get(digest) is task:
                del self._open[digest]

    async def _read(self, digest: str) -> Tokenizer:
        file = pack_file(self._spool, digest)

        def read() -> Tokenizer:
            return self._base.with_own(read_pack(file), f"adapter text {digest}", self._threads)

        return await asyncio.get_running_loop().run_in_executor(self._threads, read)


def _one_of(infos: Sequence[AdapterInfo]) -> OwnText | None:
    """The own text of some adapters, None when none ships any. Raises InvalidRequest: they ship different ones."""
    shipping = {info.name: info.text for info in infos if info.text is not None}
    if len({text.digest for text in shipping.values()}) > 1:
        raise InvalidRequest(
            f"adapters: {', '.join(map(repr, shipping))} ship different tokenizers or generation settings, so that no "
            f"text is both of theirs; ask for one of them",
            field="adapters",
        )
    return next(iter(shipping.values()), None)
