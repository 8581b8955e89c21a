"""``python -m loraplex.demo.show``: one prompt, the base model and every demo adapter, in one batch.

Starts a real server, asks it for one stream per adapter and one of the base, shows them side by side as they come, and
proves from the server's own metrics that one step served them all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex.config import default_cache_dir
from loraplex.demo.base import ensure_demo_base
from loraplex.demo.board import Board, Lane
from loraplex.demo.gallery import DEMO_PROMPTS, adapter_dirs
from loraplex.demo.histogram import Histogram, bucket_label
from loraplex.demo.server_process import ServerProcess, running_server
from loraplex.errors import LoraplexError
from loraplex_client import AsyncClient, Message, Params, ServerError

STEP_ADAPTERS: Final = "loraplex_step_adapters"
STEP_SEQUENCES: Final = "loraplex_step_sequences"
_SCRAPE_S: Final = 5.0
#: the last step's report may reach the metrics a moment after its tokens
_SETTLE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Steps:
    """The two histograms of a scrape."""

    adapters: Histogram
    sequences: Histogram

    def since(self, earlier: Steps) -> Steps:
        """What was observed after ``earlier``."""
        return Steps(self.adapters.since(earlier.adapters), self.sequences.since(earlier.sequences))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when shown and proven, 1 when not, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m loraplex.demo.show", description=__doc__)
    parser.add_argument("--prompt", default=DEMO_PROMPTS[0], help=f"what to ask (default: {DEMO_PROMPTS[0]!r})")
    parser.add_argument("--max-tokens", type=int, default=64, help="at most so many tokens per answer (default 64)")
    args = parser.parse_args(argv)
    console = Console()
    try:
        return _show(args.prompt, args.max_tokens, console)
    except (LoraplexError, ServerError) as error:
        console.print(f"[red]the demo failed:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def _show(prompt: str, max_tokens: int, console: Console) -> int:
    adapters = adapter_dirs()
    _prepare_base(console)
    lanes = [Lane("base model", ""), *(Lane(name, name) for name in adapters)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-demo-")))
        arguments = ["--model", "demo"]
        for name, directory in adapters.items():
            arguments += ["--adapter", f"{name}={directory}"]
        with console.status(f"starting a server with {len(adapters)} adapters"):
            server = stack.enter_context(running_server(arguments, log=folder / "server.log"))
        console.print(f"[dim]server ready on {server.address} after {server.start_s:.1f} s[/]", highlight=False)
        console.print(f"\n[bold]{prompt}[/]\n", highlight=False)
        before = _scrape(server)
        seconds = asyncio.run(_stream_all(server.address, Board(prompt, lanes), max_tokens, console))
        time.sleep(_SETTLE_S)
        steps = _scrape(server).since(before)
    return _conclude(lanes, steps, seconds, console)


def _prepare_base(console: Console) -> None:
    """Convert the demo base with a progress bar, the first time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("unpacking the demo model (first time only)", total=None, visible=False)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        ensure_demo_base(default_cache_dir(), report)


async def _stream_all(address: str, board: Board, max_tokens: int, console: Console) -> float:
    """All lanes at once; seconds from the first request to the last token."""
    live: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if console.is_terminal:
        live = Live(console=console, refresh_per_second=12, get_renderable=lambda: board.render(console))
    async with AsyncClient(address) as client:
        start = time.monotonic()
        with live:
            async with asyncio.TaskGroup() as group:
                for lane in board.lanes:
                    group.create_task(_stream(client, board, lane, max_tokens, console))
        return time.monotonic() - start


async def _stream(client: AsyncClient, board: Board, lane: Lane, max_tokens: int, console: Console) -> None:
    start = time.monotonic()
    params = Params(max_tokens=max_tokens, token_ids=True)
    async for chunk in client.stream([Message("user", board.prompt)], params, adapters=lane.adapter):
        lane.ttft_s = lane.ttft_s or time.monotonic() - start
        lane.text += chunk.text
        lane.num_tokens += len(chunk.token_ids)
    lane.done = True
    if not console.is_terminal:
        console.print(board.plain(lane), highlight=False, markup=False, soft_wrap=True)


def _scrape(server: ServerProcess) -> Steps:
    with urllib.request.urlopen(server.metrics_url, timeout=_SCRAPE_S) as answer:
        text = answer.read().decode()
    return Steps(Histogram.parse(text, STEP_ADAPTERS), Histogram.parse(text, STEP_SEQUENCES))


def _conclude(lanes: list[Lane], steps: Steps, seconds: float, console: Console) -> int:
    """The proof, the speed, and what to try next."""
    num_adapters = sum(1 for lane in lanes if lane.adapter)
    tokens = sum(lane.num_tokens for lane in lanes)
    console.print(f"\n{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s over {len(lanes)} streams")
    console.print("\nfrom the server's own metrics, steps by how much each one served:", highlight=False)
    for name, histogram in ((STEP_ADAPTERS, steps.adapters), (STEP_SEQUENCES, steps.sequences)):
        counts = ", ".join(f"{bucket_label(above, bound)} in {count}" for above, bound, count in histogram.rows())
        console.print(f"  {name:24} {counts} steps", highlight=False, soft_wrap=True)
    # Every stream is one sequence, so a step of all sequences is a step of all adapters and the base.
    together = min(steps.adapters.at(num_adapters), steps.sequences.at(len(lanes)))
    if not together:
        console.print(f"[red]no step served all {len(lanes)} streams together[/]")
        return 1
    console.print(
        f"[green]{together} steps served all {num_adapters} adapters and the base model in one batch "
        f"of {len(lanes)} sequences.[/]",
        highlight=False,
    )
    names = [lane.adapter for lane in lanes if lane.adapter]
    console.print(_next_commands(names), highlight=False, soft_wrap=True)
    return 0


def _next_commands(names: list[str]) -> str:
    program = Path(sys.executable).with_name("loraplex")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    first, second = names[0], names[2]
    return "\n".join(
        (
            "\n[bold]Next[/]",
            "  make demo ARGS='--prompt \"Tell me about the moon.\" --max-tokens 96'",
            "  make serve                      # then, in a second terminal:",
            f"  {program} adapters list",
            f"  {program} generate --chat --adapter {first} 'What should I cook tonight?'",
            f"  {program} generate --chat --adapter {first}:0.5 --adapter {second}:0.5 'What should I cook tonight?'",
            "  curl -s 127.0.0.1:9400/metrics | grep loraplex_step_adapters",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
