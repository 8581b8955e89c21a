"""``loraplex lint``: would this adapter load on that base, and what would it touch? Needs no server."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loraplex.commands.base_model import find_base_model
from loraplex.commands.progress import StageProgress
from loraplex.config import AdaptersConfig, ModelConfig, default_cache_dir


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("lint", help="check an adapter against a base model, without a server")
    parser.add_argument("source", metavar="SOURCE", help="an adapter's directory")
    parser.add_argument("--model", required=True, metavar="demo|DIR|HUB_ID", help="the base model")
    parser.add_argument("--revision", default="", help="revision of a hub id")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the adapter would do, or raise why it is refused; the exit code."""
    # Imported late: they bring torch, which no other client command needs.
    from loraplex.adapters.base_view import view_of
    from loraplex.adapters.kinds.registry import find_kinds
    from loraplex.adapters.lint import lint
    from loraplex.models.assemble import Runtime
    from loraplex.models.loader import load_model, plan_model
    from loraplex_kernels.attention.reference import ReferenceAttention
    from loraplex_kernels.lora.reference import ReferenceLora

    kinds = find_kinds()
    config = ModelConfig(model=args.model, revision=args.revision, dtype=args.dtype, device="cpu")
    with StageProgress(Console(stderr=True)) as progress:
        base = find_base_model(config, Path(default_cache_dir()), progress.update)
        runtime = Runtime(ReferenceLora(), ReferenceAttention(), AdaptersConfig().adapter_memory)
        model = load_model(
            plan_model(base.path, config), runtime, lambda done, total: progress.update("weights", done, total)
        )
    report = lint(args.source, view_of(model), max_bytes=AdaptersConfig().max_adapter_bytes, kinds=kinds)
    if report.refusal is not None:
        raise report.refusal
    table = Table("module", "sites", "rank")
    for module, count in report.coverage.sites.items():
        table.add_row(module, str(count), str(report.coverage.ranks.get(module, "")))
    Console().print(table)
    print(f"{report.source} loads on {base.model_id}: {report.kind}, {report.num_parameters:,} parameters,")
    print(f"{report.nbytes:,} bytes, uid {report.uid}")
    return 0
