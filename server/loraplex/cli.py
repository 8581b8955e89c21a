"""The ``loraplex`` command: parses argv, runs a subcommand, and turns what goes wrong into one line and an exit code.

0 ok, 1 failed, 2 usage, 130 interrupted, 143 terminated while a server started.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from loraplex import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's own by default) and return the exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str] | None) -> int:
    # Imported late: this takes most of a second, and Ctrl-C may come meanwhile.
    from loraplex.commands import adapters, generate, info, lint, router, serve
    from loraplex.errors import LoraplexError
    from loraplex_client import ServerError

    parser = argparse.ArgumentParser(
        prog="loraplex", description="One base model, many adapters, one batch, over gRPC."
    )
    parser.add_argument("--version", action="version", version=f"loraplex {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (serve, generate, adapters, router, info, lint):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (LoraplexError, ServerError) as error:
        print(f"loraplex: {_told(error, args)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as head, has what it wanted
        sys.stderr.close()
        return 1


def _told(error: Exception, args: argparse.Namespace) -> str:
    """The error's own message, or, when no server was reached, which one that was and what to do."""
    from loraplex_client import Unavailable

    if isinstance(error, Unavailable) and not error.from_server:
        return f"no server answers at {args.server}; start one with `loraplex serve`, or name another with --server"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
