"""``loraplex serve --node-rank`` on a further machine: holds its ranks, and answers no requests."""

from __future__ import annotations

import signal
from pathlib import Path

from rich.console import Console

from loraplex import __version__
from loraplex.commands.base_model import find_base_model
from loraplex.commands.progress import StageProgress
from loraplex.config import Config, quiet_torch


def take_part(config: Config) -> int:
    """Until the server ends; the exit code. Ctrl-C and SIGTERM take this machine out, which ends the group."""
    quiet_torch()
    from loraplex.engine.ranks.node import Node  # brings torch, which no front end needs

    for end in (signal.SIGINT, signal.SIGTERM):  # a shell starts what it does not wait for with the first one ignored
        signal.signal(end, signal.default_int_handler)
    console, nodes = Console(), config.nodes

    def tell(line: str) -> None:
        said = f"node {nodes.node_rank} of {nodes.nnodes}: {line}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)

    with StageProgress(console) as progress:
        base = find_base_model(config.model, Path(config.cache_dir), progress.update)
    first, size = nodes.node_rank * config.ranks_here, config.model.tensor_parallel_size
    last = first + config.ranks_here - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    tell(f"loraplex {__version__}, {ranks} of {size}, waiting for the first machine at {nodes.rdzv_endpoint}")
    try:
        Node(config, base.path, tell).run()
    except KeyboardInterrupt:
        tell("taken out")
    return 0
