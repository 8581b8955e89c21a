"""``loraplex adapters export``: what it is told, and what it tells of an export."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Final

from rich.console import Console

from loraplex.commands.progress import StageProgress
from loraplex.commands.settings import parse_size
from loraplex.commands.tables import mebibytes
from loraplex.types import EXPORT_QUANTIZATIONS
from loraplex_client import Client, ExportProgress
from loraplex_client.exports import DONE

_FORMATS: Final = ("peft", "merged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What an export takes."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "destination",
        metavar="DIR",
        help="a directory that is to be made, in one of the server's --export-dir; a name alone: in the first of them",
    )
    parser.add_argument(
        "--format",
        default="peft",
        choices=_FORMATS,
        help="peft: a directory that PEFT loads (the default); merged: the base with the adapter folded in, as "
        "transformers loads it",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=0,
        metavar="SIZE",
        help="of the files of a merged export, such as 2GB (default 5GB)",
    )
    parser.add_argument(
        "--quantization",
        default="",
        choices=EXPORT_QUANTIZATIONS,
        help="of the matrices of a merged export, but for the head's, as transformers loads them (default: dense); "
        "what that loses is said at the end",
    )


def export(client: Client, args: argparse.Namespace, destination: str) -> ExportProgress:
    """Have the server export, and show on standard error how far it has come; what it said last. Ctrl-C gives the
    export up."""
    told = client.export_adapter(
        args.name,
        destination,
        format=args.format,
        max_shard_bytes=args.max_shard_size,
        quantization=args.quantization,
    )
    last = ExportProgress("", 0, 0, destination)
    with contextlib.closing(told), StageProgress(Console(stderr=True)) as progress:
        for last in told:
            if last.stage != DONE:
                progress.update(last.stage, last.done_bytes, last.total_bytes)
    return last


def told(name: str, last: ExportProgress) -> str:
    """That it is there, where, and what quantizing it has lost."""
    there = f"{name} exported to {last.destination} ({mebibytes(last.total_bytes)} MiB)"
    if not last.largest_error_site:
        return there
    errors = f"up to {last.largest_error:.2%} ({last.largest_error_site}), on average {last.mean_error:.2%}"
    return f"{there}; relative error of a matrix {errors}"


def destination_to_send(destination: str, *, here: bool) -> str:
    """DIR as the server should read it. A path into a directory of this machine goes to a server on this machine
    (``here``) by its absolute form; a name alone is made in the server's own directory."""
    path = Path(destination).absolute()
    return str(path) if here and os.sep in destination and path.parent.is_dir() else destination
