"""Sets up logging, once in each process: text for people or one JSON object a line for collectors."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final

#: what logs for the library's server
GRPC_SERVER: Final = "grpc._cython.cygrpc"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logging(log_format: str, level: str) -> None:
    """Log to standard error. ``log_format`` is "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger(GRPC_SERVER).addFilter(is_news)
    if level == "info":
        logging.getLogger("torch").setLevel(logging.WARNING)  # what it tells besides is for its own developers


def is_news(record: logging.LogRecord) -> bool:
    """Whether the gRPC library tells of more than a caller that went just as its answer was sent.

    The library logs that as an error with a traceback, and a busy server has many callers that go.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError" or logging.root.isEnabledFor(logging.DEBUG)
