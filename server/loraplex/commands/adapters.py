"""``loraplex adapters``: list, show, load, pin, unload and watch the adapters of a running server."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
from rich.table import Table

from loraplex.commands.tables import mebibytes, print_table
from loraplex_client import Adapter, Client
from loraplex_client.transport import DEFAULT_ADDRESS

#: values of sampling fields that ask for nothing, where they are not just 0
_OFF: Final[dict[str, tuple[float, ...]]] = {"temperature": (), "top_p": (0, 1), "repetition_penalty": (0, 1)}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("adapters", help="the adapters of a running server")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = _action(actions, "list", _list, "all adapters, as a table")
    listing.add_argument("--json", action="store_true", help="print a list of objects, one for each adapter")
    _action(actions, "watch", _watch, "each adapter, then each change, a line each, until Ctrl-C")
    _action(actions, "show", _show, "all about one adapter").add_argument("name", metavar="NAME")
    load = _action(actions, "load", _load, "load SOURCE under NAME; returns when it can be served")
    load.add_argument("name", metavar="NAME")
    load.add_argument(
        "source", metavar="SOURCE", help="a directory, or file:///DIR; it must lie in one of the server's --adapter-dir"
    )
    load.add_argument("--pinned", action="store_true", help="never put it out of device memory")
    load.add_argument("--replace", action="store_true", help="take over NAME if it is loaded")
    for word, act, text in (
        ("pin", _pin, "keep NAME in device memory"),
        ("unpin", _unpin, "let NAME be put out of device memory when room is needed"),
    ):
        _action(actions, word, act, text).add_argument("name", metavar="NAME")
    unload = _action(actions, "unload", _unload, "unload NAME when its running requests are over")
    unload.add_argument("name", metavar="NAME")
    unload.add_argument("--abort", action="store_true", help="end its running requests instead")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    act: Callable[[Client, argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    def run(args: argparse.Namespace) -> int:
        with Client(args.server) as client:
            act(client, args)
        return 0

    parser = actions.add_parser(name, help=text)
    parser.add_argument("--server", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    parser.set_defaults(run=run)
    return parser


def _list(client: Client, args: argparse.Namespace) -> None:
    adapters = client.list_adapters()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(adapters)).decode())
    elif adapters:
        print_table(_table(adapters))
    else:
        print(f"no adapters on {args.server}; load one with `loraplex adapters load NAME SOURCE`")


def _table(adapters: Sequence[Adapter]) -> Table:
    table = Table()
    table.add_column("name", overflow="fold")
    for label in ("kind", "state"):
        table.add_column(label, no_wrap=True)
    for label in ("rank", "MiB"):
        table.add_column(label, no_wrap=True, justify="right")
    table.add_column("where")
    table.add_column("in flight", justify="right")
    table.add_column("source", overflow="fold")
    for adapter in adapters:
        table.add_row(
            adapter.name,
            adapter.kind,
            adapter.state,
            str(adapter.max_rank or ""),
            mebibytes(adapter.bytes),
            adapter.residency + (", pinned" if adapter.pinned else ""),
            str(adapter.in_flight),
            adapter.source,
        )
    return table


def _show(client: Client, args: argparse.Namespace) -> None:
    _print_fields(client.get_adapter(args.name))


def _load(client: Client, args: argparse.Namespace) -> None:
    source = source_to_send(args.source, args.server)
    _print_fields(client.load_adapter(args.name, source, pinned=args.pinned, replace=args.replace))


def source_to_send(source: str, server: str) -> str:
    """SOURCE as the server should read it. A directory of this machine goes to a server on this machine by its
    absolute path: the server looks a relative one up in its own allowed directories, not in ours.
    """
    host = server.rpartition(":")[0].strip("[]")
    here = host in ("localhost", "::1") or host.startswith("127.")
    path = Path(source)
    return str(path.absolute()) if here and path.is_dir() else source


def _unload(client: Client, args: argparse.Namespace) -> None:
    print(_line(client.unload_adapter(args.name, abort=args.abort)))


def _pin(client: Client, args: argparse.Namespace) -> None:
    print(f"{client.pin_adapter(args.name).name} pinned")


def _unpin(client: Client, args: argparse.Namespace) -> None:
    print(f"{client.pin_adapter(args.name, pinned=False).name} unpinned")


def _watch(client: Client, args: argparse.Namespace) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # how a watch ends
        for adapter in client.watch_adapters():
            print(_line(adapter), flush=True)


def _line(adapter: Adapter) -> str:
    words = [adapter.name, adapter.state]
    if adapter.kind:
        words.append(f"kind={adapter.kind}")
    if adapter.uid:
        words.append(f"uid={adapter.uid}")
    if adapter.pinned:
        words.append("pinned")
    if adapter.error:
        words.append(f"error={adapter.error}")
    return " ".join(words)


def _print_fields(adapter: Adapter) -> None:
    rows: Iterable[tuple[str, str]] = (
        ("name", adapter.name),
        ("uid", adapter.uid),
        ("kind", adapter.kind),
        ("state", adapter.state),
        ("source", adapter.source),
        ("generation", str(adapter.generation)),
        ("rank", str(adapter.max_rank or "")),
        ("parameters", f"{adapter.num_parameters:,}"),
        ("memory", f"{mebibytes(adapter.bytes)} MiB"),
        ("where", adapter.residency + (", pinned" if adapter.pinned else "")),
        ("in flight", str(adapter.in_flight)),
        ("probe", _probe(adapter)),
        ("invoked by", _invocation(adapter)),
        ("tokenizer", _tokenizer(adapter)),
        ("defaults", _defaults(adapter)),
        ("loaded", _when(adapter.loaded_at)),
        ("last used", _when(adapter.last_used_at)),
        ("error", adapter.error),
    )
    table = Table(show_header=False)
    for label, value in rows:
        if value:
            table.add_row(label, value)
    print_table(table)
    if adapter.sites:
        print_table(_modules(adapter))


def _modules(adapter: Adapter) -> Table:
    """What it touches, a row for each module name."""
    table = Table("module", "sites", "rank", "changes")
    for module, count in adapter.sites.items():
        rank = adapter.ranks.get(module, 0)
        table.add_row(module, str(count), str(rank or ""), adapter.changes.get(module, ""))
    return table


def _probe(adapter: Adapter) -> str:
    probe = adapter.probe
    if probe is None:
        return ""
    share = f"{probe.top_changed:.0%} of {probe.num_tokens} positions"
    return f"logits move by up to {probe.max_change:.3g}; another best next token at {share}"


def _invocation(adapter: Adapter) -> str:
    """As text too: what it is made of depends on what stands before it in a prompt."""
    ids = " ".join(map(str, adapter.invocation_tokens))
    return f"{ids}: {adapter.invocation_text!r}" if adapter.invocation_text else ids


def _tokenizer(adapter: Adapter) -> str:
    tokenizer = adapter.tokenizer
    if tokenizer is None:
        return ""
    whose = "its own" if tokenizer.own else "of the base model"
    template = ", with its own chat template" if tokenizer.chat_template else ""
    if tokenizer.chat_template_not_allowed:
        template = "; its chat template is not used (the server runs without --allow-adapter-templates)"
    return f"{whose}, {tokenizer.vocab_size:,} tokens{template}"


def _defaults(adapter: Adapter) -> str:
    """What it ships, in the words of requests; what is off is left out."""
    profile, words = adapter.profile, []
    if profile is not None and profile.sampling is not None:
        values = dataclasses.asdict(profile.sampling)
        words = [f"{name} {value:g}" for name, value in values.items() if value not in _OFF.get(name, (0,))]
    if profile is not None and profile.stop_token_ids is not None:
        words.append("ends at " + " ".join(map(str, profile.stop_token_ids)))
    return ", ".join(words)


def _when(time: datetime | None) -> str:
    return time.astimezone().isoformat(" ", "seconds") if time else "never"
