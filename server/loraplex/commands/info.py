"""``loraplex info``: what a running server serves."""

from __future__ import annotations

import argparse

from rich.table import Table

from loraplex.commands.tables import mebibytes, print_table
from loraplex_client import Client
from loraplex_client.transport import DEFAULT_ADDRESS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("info", help="what a running server serves")
    parser.add_argument("--server", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the model as a table; the exit code."""
    with Client(args.server) as client:
        model = client.model()
    limits = model.limits
    has_cache, has_states = "attention" in model.backends, limits.state_num_slots > 0
    rows = {
        "model": model.id,
        "architecture": model.architecture,
        "dtype": f"{model.dtype} on {model.device}",
        "quantization": model.quantization,
        "weights": f"{mebibytes(model.weight_bytes)} MiB",
        "tensor parallel": str(model.tensor_parallel_size),
        "vocabulary": f"{model.vocab_size:,} tokens",
        "longest sequence": f"{model.max_model_len:,} tokens",
        "adapter targets": ", ".join(model.sites),
        "backends": ", ".join(f"{op} {name}" for op, name in sorted(model.backends.items())),
        "in a step": f"{limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens",
        "KV cache": f"{limits.kv_num_pages:,} pages of {limits.kv_page_size} tokens" if has_cache else "",
        "states": f"{limits.state_num_slots:,} slots of {mebibytes(limits.state_slot_bytes)} MiB" if has_states else "",
        "adapter memory": f"{mebibytes(limits.adapter_memory_bytes)} MiB",
        "adapters of a request": f"up to {limits.max_adapters_per_request}",
        "server": f"loraplex {model.server_version} at {args.server}",
    }
    table = Table(show_header=False)
    for label, value in rows.items():
        if value:
            table.add_row(label, value)
    print_table(table)
    return 0
