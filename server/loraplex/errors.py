"""The exceptions Loraplex raises for what a user, a file or the network can cause.

::

    LoraplexError                     catch this to catch them all
    |-- InvalidRequest                the request is wrong: mend the named field and send it again
    |-- InvalidAdapter                the adapter's files are wrong: mend the named file or key
    |-- UnsupportedFeature            known and refused by name: use another adapter kind, config or option
    |-- NotFound                      no such adapter, source or model: check the name (the nearest is named)
    |-- AlreadyExists                 the name is taken: use another, or ask for REPLACE
    |-- Mismatch                      well-formed, but does not fit this base model or this state of the server
    |-- NonFinite                     this request's logits were not finite; its neighbours went on
    |-- OverCapacity                  a queue or memory budget is full: retry after ``retry_after_s``
    |-- Unavailable                   draining, starting, or the engine is gone: retry elsewhere or later
    |   `-- GroupLost                 a rank of a tensor-parallel group is gone: the engine starts anew
    |-- NotPermitted                  the path or action is outside what the operator allows
    |-- InvalidModel                  the base model's files are wrong or incomplete
    |-- InvalidConfig                 a command-line flag or configuration key is wrong
    |-- ConversionFailed              converting a checkpoint failed; nothing half-made is left
    |-- RequestCancelled              the caller cancelled, or its deadline passed
    `-- InternalError                 our bug: the message carries the request id to look up in the log

Every message says what, which value, what is allowed, and where. Exceptions cross the process border as
``Failure`` values (``engine/messages.py``) by class name; ``rpc/status.py`` maps each class to one status code.
"""

from __future__ import annotations


class LoraplexError(Exception):
    """Base of all errors a caller can act on. ``str(error)`` is the whole message."""

    #: field or key the message speaks of ("sampling.top_p"); empty when there is none
    field: str = ""
    #: seconds after which a retry may succeed; 0 when a retry is no use
    retry_after_s: float = 0.0

    def __init__(self, message: str, *, field: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(LoraplexError):
    """A request field, or a combination of fields, is wrong."""


class InvalidAdapter(LoraplexError):
    """An adapter's files are malformed; names the file and the key."""


class UnsupportedFeature(LoraplexError):
    """A feature we know and refuse, by its published name."""


class NotFound(LoraplexError):
    """Unknown adapter, source or model."""


class AlreadyExists(LoraplexError):
    """The name is in use."""


class Mismatch(LoraplexError):
    """Well-formed, but it does not fit this base model or the present state."""


class NonFinite(LoraplexError):
    """This request's logits turned non-finite."""


class OverCapacity(LoraplexError):
    """A queue or a memory budget is full."""


class Unavailable(LoraplexError):
    """The server is starting, draining, or its engine is gone."""


class GroupLost(Unavailable):
    """Ranks of a tensor-parallel group have lost each other, and can do no more steps together."""


class NotPermitted(LoraplexError):
    """Outside what the operator allows."""


class InvalidModel(LoraplexError):
    """The base model's files are wrong or incomplete."""


class InvalidConfig(LoraplexError):
    """A flag or configuration key is wrong."""


class ConversionFailed(LoraplexError):
    """A checkpoint conversion failed and left nothing behind."""


class RequestCancelled(LoraplexError):
    """The caller cancelled the request or its deadline passed."""


class InternalError(LoraplexError):
    """A bug of ours."""


#: class name -> class, for errors that cross the process border by name
ERRORS: dict[str, type[LoraplexError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        InvalidAdapter,
        UnsupportedFeature,
        NotFound,
        AlreadyExists,
        Mismatch,
        NonFinite,
        OverCapacity,
        Unavailable,
        GroupLost,
        NotPermitted,
        InvalidModel,
        InvalidConfig,
        ConversionFailed,
        RequestCancelled,
        InternalError,
    )
}
