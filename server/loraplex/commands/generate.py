"""``loraplex generate``: one prompt to a running server, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys

from loraplex.commands.settings import parse_natural
from loraplex_client import Client, Message, Params, Routing
from loraplex_client.transport import DEFAULT_ADDRESS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("generate", help="stream one answer from a running server")
    parser.add_argument("prompt", metavar="PROMPT", help="the text, or - to read standard input")
    parser.add_argument("--server", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=parse_weighted_name,
        metavar="NAME[:WEIGHT]",
        help="repeat for a weighted sum; none is the base model. The weight is what follows the last colon, if that is "
        "a number: write fr:2:1 for an adapter named fr:2. auto:ROUTER is what that router chooses by the prompt",
    )
    parser.add_argument("--temperature", type=float, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this share; 1 (default) is off")
    parser.add_argument("--seed", type=parse_natural, help="the same seed gives the same tokens")
    parser.add_argument(
        "--adapter-sampling",
        action="store_true",
        help="draw as the adapter's generation_config.json says, if it has one",
    )
    parser.add_argument("--max-tokens", type=parse_natural, default=128, help="default %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeats")
    parser.add_argument("--chat", action="store_true", help="send PROMPT as a user's message of a chat")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end after this time; none by default")
    parser.set_defaults(run=run)


def parse_weighted_name(text: str) -> tuple[str, float]:
    """NAME[:WEIGHT]; the weight is what follows the last colon, if that is a number."""
    name, separator, weight = text.rpartition(":")
    if not separator:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        return text, 1.0


def run(args: argparse.Namespace) -> int:
    """Stream the answer to standard output; the exit code."""
    wrong = _contradiction(args)
    if wrong:
        print(f"loraplex generate: {wrong}", file=sys.stderr)
        return 2
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = Params(
        max_tokens=args.max_tokens,
        temperature=args.temperature or 0.0,
        top_p=args.top_p or 0.0,
        seed=args.seed,
        stop=tuple(args.stop),
        adapter_sampling=args.adapter_sampling,
    )
    prompt = [Message("user", text)] if args.chat else text
    with Client(args.server) as client:
        idle: list[str] = []
        chosen: Routing | None = None
        begun = False
        try:
            for chunk in client.stream(prompt, params, adapters=dict(args.adapter), timeout=args.timeout):
                begun = True
                print(chunk.text, end="", flush=True)
                idle += [use.name for use in chunk.adapters if not use.invoked]
                chosen = chunk.routing or chosen
        finally:  # an answer that was cut short ends its line too
            if begun:
                print()
    if chosen is not None:
        print(f"note: {_choice(chosen)}", file=sys.stderr)
    for name in idle:
        print(
            f"note: adapter {name!r} changed nothing, because the prompt does not hold its invocation tokens "
            f"(loraplex adapters show {name})",
            file=sys.stderr,
        )
    return 0


def _choice(routing: Routing) -> str:
    """What a router chose, and how sure it was."""
    ranked = ", ".join(f"{each.name} {each.probability:.0%}" for each in routing.candidates)
    return f"router {routing.router!r} chose {routing.adapter or 'the base model'} ({ranked})"


def _contradiction(args: argparse.Namespace) -> str:
    """What the flags say that cannot be sent; empty: nothing."""
    names = [name for name, _ in args.adapter]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        return f"--adapter {twice} is given twice; give it once, as {twice}:WEIGHT with the sum of the weights"
    own = {"--temperature": args.temperature, "--top-p": args.top_p, "--seed": args.seed}
    given = [flag for flag, value in own.items() if value is not None]
    if args.adapter_sampling and given:
        return f"--adapter-sampling leaves sampling to the adapter; it does not go with {', '.join(given)}"
    return ""
