"""``loraplex adapters merge``: what it is told, and what it tells of a merge."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from rich.console import Console

from loraplex.adapters.merging.methods import MAJORITY_SIGN_METHODS, METHODS
from loraplex.adapters.merging.recipe import is_recipe, shown
from loraplex.commands.generate import parse_weighted_name
from loraplex.commands.progress import working
from loraplex.commands.settings import parse_natural
from loraplex.errors import InvalidRequest
from loraplex_client import Adapter, Client, Merge, MergeInput, MergeOptions

#: options as ``show`` tells them, with the values that are their defaults
_DEFAULTS: Final = {
    "density": 0,
    "majority_sign_method": "total",
    "svd_rank": 0,
    "svd_clamp": 0,
    "max_error": 0,
    "seed": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a merge takes."""
    parser.add_argument("name", metavar="NAME", help="of the result")
    parser.add_argument(
        "inputs",
        nargs="+",
        type=parse_weighted_name,
        metavar="INPUT[:WEIGHT]",
        help="loaded adapters; the weight is what follows the last colon, if that is a number, else 1",
    )
    parser.add_argument(
        "--method",
        default="cat",
        choices=METHODS,
        metavar="METHOD",
        help=f"as PEFT names them: {', '.join(METHODS)}; default %(default)s, the exact sum",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the values that is kept, above 0 up to 1: ties, dare and magnitude_prune need it",
    )
    parser.add_argument(
        "--majority-sign", default="", choices=MAJORITY_SIGN_METHODS, help="how ties elects signs; default total"
    )
    parser.add_argument(
        "--svd-rank",
        type=parse_natural,
        default=0,
        metavar="RANK",
        help="rank of the result of an svd (default: the largest of the inputs'), or of a cat (default: exact)",
    )
    parser.add_argument(
        "--svd-clamp", type=float, default=0.0, metavar="QUANTILE", help="clamp the factors of an svd to this quantile"
    )
    parser.add_argument(
        "--max-error",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="in place of a rank: the smallest ranks whose relative error at each site is within this",
    )
    parser.add_argument("--seed", type=parse_natural, default=0, help="of the draws of dare; default 0")
    parser.add_argument("--replace", action="store_true", help="take over NAME if it is loaded")
    parser.add_argument("--pin", action="store_true", help="never put it out of device memory")


def merge(client: Client, args: argparse.Namespace) -> Adapter:
    """Have the server merge, and say on standard error that it does."""
    options = MergeOptions(
        method=args.method,
        density=args.density,
        majority_sign_method=args.majority_sign,
        svd_rank=args.svd_rank,
        svd_clamp=args.svd_clamp,
        max_error=args.max_error,
        seed=args.seed,
    )
    inputs = dict(args.inputs)
    if len(inputs) < len(args.inputs):
        names = [name for name, _ in args.inputs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{twice!r} is named twice; name it once, as {twice}:WEIGHT with the sum of its weights")
    try:
        with working(Console(stderr=True), f"merging {' + '.join(inputs)} ({args.method})"):
            return client.merge_adapters(args.name, inputs, options, pinned=args.pin, replace=args.replace)
    except KeyboardInterrupt:
        print(
            f"interrupted; the server goes on with it: `loraplex adapters show {args.name}` tells what became of it",
            file=sys.stderr,
        )
        raise


def source(adapter: Adapter) -> str:
    """Where an adapter is from; of a merge, what it was made from, and how."""
    merge = adapter.merge
    if merge is None:
        return shown(adapter.source) if is_recipe(adapter.source) else adapter.source
    sum_ = " ".join(_term(index, each) for index, each in enumerate(merge.inputs))
    options = [f"{name} {value}" for name, default in _DEFAULTS.items() if (value := getattr(merge, name)) != default]
    return ", ".join((f"{sum_} by {merge.method}", *options))


def _term(index: int, each: MergeInput) -> str:
    """One of a sum's: ``+ 0.5 json``; the first without a plus."""
    sign = "-" if each.weight < 0 else "+" if index else ""
    size = f"{abs(each.weight):g}"
    return " ".join(word for word in (sign, "" if size == "1" else size, each.name) if word)


def told_errors(merge: Merge | None) -> str:
    """What was lost by compressing; empty: nothing."""
    if merge is None or not merge.largest_error:
        return ""
    return f"relative error of a site up to {merge.largest_error:.2%}, on average {merge.mean_error:.2%}"
