"""From a source directory to an ``AdapterDelta`` on the host. Runs in a loader thread; touches no shared state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.coverage import coverage_of
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.effect import check_effect, says_identity
from loraplex.adapters.fit import check_fit
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import read_config
from loraplex.adapters.reading.keys import check_keys
from loraplex.adapters.reading.safetensors_file import read_tensors
from loraplex.adapters.reading.source import TENSOR_FILE, AdapterDir
from loraplex.adapters.reading.stray import refuse_stray
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.adapters.saved.read import read_saved
from loraplex.adapters.spelling import Spelling
from loraplex.adapters.telling import telling_tokens
from loraplex.adapters.text.own_text import NO_TEXT, OwnTexts
from loraplex.adapters.uid import begun_with, ended
from loraplex.errors import UnsupportedFeature

#: for whoever does not ask what else is installed
BUILT_IN: Final = KindRegistry()


def load_adapter(
    directory: AdapterDir,
    base: BaseView,
    *,
    max_bytes: int,
    kinds: KindRegistry = BUILT_IN,
    texts: OwnTexts | None = None,
    give_way: Callable[[], None] = lambda: None,
) -> AdapterDelta:
    """Read, check and lower the adapter in ``directory``; factors are in the base's dtype on the host.

    ``texts`` reads what it has of text of its own; None: that is not looked at. ``give_way`` is called between pieces
    of work.

    Raises:
        InvalidAdapter, UnsupportedFeature, Mismatch, OverCapacity, NotPermitted: named by file and key.
    """
    config = read_config(directory, kinds.also_known)
    kind = kinds.of(config)
    check_keys(config, kind.keys, kind.name)
    digest, where = begun_with(config), directory.where(TENSOR_FILE)
    with directory.open(TENSOR_FILE) as fd:
        file = read_tensors(fd, where, max_bytes=max_bytes, digest=digest, give_way=give_way)
    files = AdapterFiles(config, TensorBag(file.tensors, where, file.metadata), max_bytes)
    spelling = Spelling.of(files.tensors, base)
    base = spelling.view(base)
    give_way()
    saved = read_saved(files, base)
    view = saved.view()
    lowered = kind.lower(files, view)
    give_way()
    _check_invocation(lowered, saved.vocab_size, base.vocab_size, where)
    check_fit(lowered.sites, view, kind.name)
    merged = saved.merged(lowered.sites)
    refuse_stray(files.tensors.left, base, where)
    give_way()
    identity = says_identity(files.tensors.metadata)
    if not identity:
        check_effect(merged, base, where)
    vocab_size = saved.vocab_size or base.vocab_size
    text = NO_TEXT if texts is None else texts.read(directory, vocab_size, lowered.invocation_tokens)
    digest.update(text.digest)
    sites = {site.name: merged[site.name] for site in base.sites if site.name in merged}
    return AdapterDelta(
        uid=ended(digest),
        kind=kind.name,
        sites=spelling.back(sites),
        coverage=coverage_of(sites, base.by_name()),
        vocab_size=saved.vocab_size,
        invocation_tokens=lowered.invocation_tokens,
        identity=identity,
        telling_tokens=telling_tokens(sites, base.sites),
        text=text.own,
        template_unused=text.template_unused,
        invocation_text=text.invocation,
    )


def _check_invocation(lowered: Lowered, vocab_size: int, known: int, where: str) -> None:
    """Raises UnsupportedFeature: an adapter that is on from a place on, and adds tokens to the ``known`` ones."""
    if lowered.invocation_tokens and vocab_size:
        raise UnsupportedFeature(
            f"{where}: embeddings of {vocab_size} tokens, more than the model's {known}, together with invocation "
            "tokens are not served: before its invocation, or without one, the base answers, which has none of the "
            "added tokens",
            field="alora_invocation_tokens",
        )
