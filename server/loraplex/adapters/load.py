"""From a source directory to an ``AdapterDelta`` on the host. Runs in a loader thread; touches no shared state."""

from __future__ import annotations

import hashlib
import json
from typing import Final

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.kinds import kind_of
from loraplex.adapters.peft_config import MAX_CONFIG_BYTES, parse_config
from loraplex.adapters.safetensors_file import read_tensors
from loraplex.adapters.source import CONFIG_FILE, TENSOR_FILE, AdapterDir, read_small_file
from loraplex.models.sites import Site
from loraplex.types import Coverage

#: hex digits of the content digest that are kept: 128 bits
UID_HEX_DIGITS: Final = 32


def load_adapter(directory: AdapterDir, base: BaseView, *, max_bytes: int) -> AdapterDelta:
    """Read, check and lower the adapter in ``directory``; factors are in the base's dtype on the host.

    The uid is a SHA-256 over the canonical config and the tensor file's bytes as they were read.

    Raises:
        InvalidAdapter, UnsupportedFeature, Mismatch, OverCapacity, NotPermitted: named by file and key.
    """
    config = parse_config(read_small_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES), directory.where(CONFIG_FILE))
    kind = kind_of(config)
    canonical = json.dumps(config.values, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical)
    where = directory.where(TENSOR_FILE)
    with directory.open(TENSOR_FILE) as fd:
        tensors = read_tensors(fd, where, max_bytes=max_bytes, digest=digest)
    deltas = kind.lower(config, tensors, where, base)
    return AdapterDelta(digest.hexdigest()[:UID_HEX_DIGITS], kind.name, deltas, _coverage(deltas, base.by_name()))


def _coverage(deltas: dict[str, SiteDelta], sites: dict[str, Site]) -> Coverage:
    """Per module name, the number of sites and the largest rank."""
    counts: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for name, delta in deltas.items():
        module = sites[name].module
        counts[module] = counts.get(module, 0) + 1
        ranks[module] = max(ranks.get(module, 0), delta.rank)
    return Coverage(counts, ranks)
