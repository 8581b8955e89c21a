"""A safetensors file from a stranger: header checked by us, bytes read once from one descriptor.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data. The
library's own reader accepts duplicate keys, path-like names and headers of any size; nothing is handed to it. Each byte
is hashed and kept in the same pass, so the digest is that of the tensors returned even if the file changes meanwhile.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from loraplex.adapters.reading.strict_json import parse_object
from loraplex.errors import InvalidAdapter, OverCapacity

MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 20_000
MAX_DIMENSIONS: Final = 3
MAX_NAME_BYTES: Final = 512
#: brackets a header of MAX_TENSORS entries may need, metadata included: a bound before anything is parsed
_MAX_BRACKETS: Final = 4 * MAX_TENSORS
#: bytes read, hashed and checked per call: between two of them other threads get the interpreter and a core
CHUNK_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 8
_MAX_ELEMENTS: Final = 1 << 53

#: what low-rank factors may be stored in
FLOAT_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ENTRY_KEYS: Final = {"dtype", "shape", "data_offsets"}


class Hash(Protocol):
    """A running digest, as ``hashlib.sha256()`` makes."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checked header; ``begin``/``end`` are bytes from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors in file order, and what the file says of itself (``__metadata__``)."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file's tensors by name, in their stored dtypes, and its metadata, which the header's size bounds."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_tensors(
    fd: int, where: str, *, max_bytes: int, digest: Hash | None = None, give_way: Callable[[], None] = lambda: None
) -> TensorFile:
    """Every tensor of the open file ``fd``, on the host; the file's bytes go through ``digest``. ``give_way`` is called
    after every ``CHUNK_BYTES`` or so.

    Raises:
        InvalidAdapter: the file is malformed, truncated, or holds a non-finite value; names the file and the key.
        OverCapacity: the file is larger than ``max_bytes``.
    """
    running = digest if digest is not None else hashlib.sha256()
    header, start = _read_header(fd, where, max_bytes, running)
    tensors: dict[str, torch.Tensor] = {}
    gave_way_at = 0
    for entry in header.entries:
        if entry.end - gave_way_at > CHUNK_BYTES:
            give_way()
            gave_way_at = entry.begin
        storage = _read_exactly(fd, start + entry.begin, entry.end - entry.begin, where, running, give_way)
        tensor = storage.view(entry.dtype)
        if not _is_finite(tensor, give_way):
            raise InvalidAdapter(f"{where}: tensor {entry.name!r} holds NaN or Inf; only finite values are served")
        tensors[entry.name] = tensor.view(entry.shape)
    return TensorFile(tensors, header.metadata)


def parse_header(raw: bytes, data_bytes: int, where: str) -> Header:
    """The header ``raw``, checked against ``data_bytes`` of data behind it.

    Raises:
        InvalidAdapter: names the file and the key.
    """
    if raw.count(b"{") + raw.count(b"[") > _MAX_BRACKETS:
        raise InvalidAdapter(f"{where}: the header holds more than {MAX_TENSORS} tensors")
    header = parse_object(raw, f"{where} header")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise InvalidAdapter(f"{where}: __metadata__ must map strings to strings")
    if not 0 < len(header) <= MAX_TENSORS:
        raise InvalidAdapter(f"{where}: the header holds {len(header)} tensors; 1 to {MAX_TENSORS} are allowed")
    entries = sorted((_entry(name, value, where) for name, value in header.items()), key=lambda e: (e.begin, e.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise InvalidAdapter(
                f"{where}: tensor {entry.name!r} begins at byte {entry.begin} of the data, but the one before it ends "
                f"at {end}: extents must follow each other without gap or overlap"
            )
        end = entry.end
    if end != data_bytes:
        raise InvalidAdapter(f"{where}: the header declares {end} bytes of data, the file holds {data_bytes}")
    return Header(tuple(entries), metadata)


def _read_header(fd: int, where: str, max_bytes: int, digest: Hash) -> tuple[Header, int]:
    """The checked header, and the offset in the file at which the data begins."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidAdapter(f"{where}: not a regular file")
    size = status.st_size
    if size > max_bytes:
        raise OverCapacity(f"{where}: {size} bytes; at most {max_bytes} are allowed (max_adapter_bytes)")
    if size < _LENGTH_BYTES:
        raise InvalidAdapter(f"{where}: {size} bytes is too short for a safetensors file")
    length = int.from_bytes(_read_bytes(fd, 0, _LENGTH_BYTES, where, digest), "little")
    data_bytes = size - _LENGTH_BYTES - length
    if length > MAX_HEADER_BYTES or data_bytes < 0:
        raise InvalidAdapter(
            f"{where}: the header length is {length} bytes; at most {MAX_HEADER_BYTES} are allowed, and the file has "
            f"{size - _LENGTH_BYTES} left"
        )
    raw = _read_bytes(fd, _LENGTH_BYTES, length, where, digest)
    return parse_header(raw, data_bytes, where), _LENGTH_BYTES + length


def _entry(name: str, value: object, where: str) -> TensorEntry:
    _check_name(name, where)
    if type(value) is not dict or set(value) != _ENTRY_KEYS:
        raise InvalidAdapter(f"{where}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape = value["dtype"], value["shape"]
    if type(dtype) is not str or dtype not in FLOAT_DTYPES:
        raise InvalidAdapter(
            f"{where}: tensor {name!r} has dtype {str(dtype)[:40]!r}; adapters may hold {', '.join(FLOAT_DTYPES)}"
        )
    dimensions = _sizes(shape, f"{where}: shape of tensor {name!r}")
    if len(dimensions) > MAX_DIMENSIONS:
        raise InvalidAdapter(
            f"{where}: tensor {name!r} has {len(dimensions)} dimensions; at most {MAX_DIMENSIONS} are allowed"
        )
    offsets = _sizes(value["data_offsets"], f"{where}: data_offsets of tensor {name!r}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidAdapter(f"{where}: data_offsets of tensor {name!r} must be [begin, end] with begin <= end")
    # of a tensor without elements: torch multiplies its sizes all the same, and overflows
    if math.prod(size or 1 for size in dimensions) > _MAX_ELEMENTS:
        raise InvalidAdapter(f"{where}: tensor {name!r} of shape {list(dimensions)} is larger than any file")
    declared = math.prod(dimensions) * FLOAT_DTYPES[dtype].itemsize
    if declared != offsets[1] - offsets[0]:
        raise InvalidAdapter(
            f"{where}: tensor {name!r} of shape {list(dimensions)} and dtype {dtype} takes {declared} bytes, its "
            f"data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, FLOAT_DTYPES[dtype], dimensions, offsets[0], offsets[1])


def _check_name(name: str, where: str) -> None:
    plain = name.isascii() and name.isprintable() and " " not in name
    if not plain or not 0 < len(name) <= MAX_NAME_BYTES or ".." in name or "/" in name or "\\" in name:
        raise InvalidAdapter(
            f"{where}: tensor name {name[:100]!r} is not plain: printable ASCII without spaces, '/' or '..', at most "
            f"{MAX_NAME_BYTES} characters"
        )


def _sizes(value: object, what: str) -> tuple[int, ...]:
    """A short list of true ints in 0..2^53; bool is no int here."""
    if type(value) is not list or len(value) > 16 or not all(type(v) is int and 0 <= v <= 1 << 53 for v in value):
        raise InvalidAdapter(f"{what} must be a short list of non-negative integers, got {str(value)[:80]}")
    return tuple(value)


def _read_bytes(fd: int, offset: int, count: int, where: str, digest: Hash) -> bytes:
    return _read_exactly(fd, offset, count, where, digest, lambda: None).numpy().tobytes()


def _read_exactly(
    fd: int, offset: int, count: int, where: str, digest: Hash, give_way: Callable[[], None]
) -> torch.Tensor:
    """Uint8 ``[count]``."""
    storage = torch.empty(count, dtype=torch.uint8)
    view = storage.numpy().data
    done = 0
    while done < count:
        if done:
            give_way()
        piece = view[done : min(done + CHUNK_BYTES, count)]
        got = os.preadv(fd, [piece], offset + done)
        if got == 0:
            raise InvalidAdapter(f"{where}: truncated: it ended at byte {offset + done} while it was being read")
        digest.update(piece[:got])
        done += got
    return storage


def _is_finite(tensor: torch.Tensor, give_way: Callable[[], None]) -> bool:
    step = CHUNK_BYTES // tensor.dtype.itemsize
    for start in range(0, tensor.numel(), step):
        if start:
            give_way()
        if not math.isfinite(float(tensor[start : start + step].abs().amax())):
            return False
    return True
