"""What the bank says: uploads that came to an end, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.errors import LoraplexError


@dataclass(frozen=True, slots=True)
class UploadDone:
    """An adapter became usable; ``seconds``: the loop's writing, and the wait for the copies behind it to land."""

    uid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """An adapter could not be written; it is on the host alone again."""

    uid: str
    error: LoraplexError


@dataclass(frozen=True, slots=True)
class Progress:
    """What one ``advance`` brought to an end."""

    done: tuple[UploadDone, ...] = ()
    failed: tuple[UploadFailed, ...] = ()


@dataclass(frozen=True, slots=True)
class BankStats:
    """Gauges, and totals since the start. Bytes are those of the layout: true ranks, rounded up where it rounds."""

    device_bytes: int
    host_bytes: int
    evictions: int
    uploads: int
    upload_s: float
    device_uids: tuple[str, ...]
    host_uids: tuple[str, ...]
