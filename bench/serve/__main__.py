"""``python -m bench.serve``: load a running server, and leave JSON, plots and a page behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console

from bench.serve.compare import MetricsUnreadable
from bench.serve.document import Document
from bench.serve.load import Halt, Stop
from bench.serve.options import Options, parse
from bench.serve.out_dir import OutDir, OutDirUnwritable
from bench.serve.plots import NAMES, draw
from bench.serve.progress import LoadProgress
from bench.serve.record import make_document
from bench.serve.report import render
from bench.serve.session import CannotLoad, ImpossibleOptions, Session, measure
from bench.serve.table import show

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
#: by why the load ended early; one that was asked to end after --max-seconds did what it was asked
_EXIT_CODES: Final = {"": 0, "time": 0, "lost": FAILED, "interrupted": INTERRUPTED}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one load; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(words)
    console, errors = Console(), Console(stderr=True)
    try:
        out = OutDir(options.out)
        session, stop = asyncio.run(_measure(options, console))
        document = make_document(session, options, stop, ["python", "-m", "bench.serve", *words])
        _write(document, out, console)
    except (ImpossibleOptions, OutDirUnwritable) as error:
        _say(errors, f"bench.serve: {error}")
        return USAGE
    except (CannotLoad, MetricsUnreadable) as error:
        _say(errors, f"bench.serve: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say(errors, "bench.serve: interrupted")
        return INTERRUPTED
    show(document, console)
    if not any(side.all.completed for side in document.sides.values()):
        return _EXIT_CODES[document.stopped] or FAILED
    return _EXIT_CODES[document.stopped]


async def _measure(options: Options, console: Console) -> tuple[Session, Stop | None]:
    """One Ctrl-C ends the load and reports it, a second one ends the program."""
    loop, halt = asyncio.get_running_loop(), Halt()

    def interrupted(by: signal.Signals) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
        halt.request(Stop("interrupted", f"interrupted by {by.name}"))

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupted, signum)
    with LoadProgress(console) as progress:
        return await measure(options, halt, progress), halt.stop


def _write(document: Document, out: OutDir, console: Console) -> None:
    # The numbers first: should a picture fail, they are safe.
    written = [out.write("load.json", msgspec.json.encode(document) + b"\n")]
    plots = draw(document)
    for name in NAMES[len(plots) :]:
        out.remove(f"{name}.png")
    written += [out.write(f"{plot.name}.png", plot.png) for plot in plots]
    written.append(out.write("report.html", render(document, plots)))
    _say(console, f"written to {out.path}: {', '.join(written)}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
