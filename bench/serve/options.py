"""The command line of ``python -m bench.serve``: text to values, or a refusal that names option, value and allowed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bench.serve.workload import Arrival, Lengths, Popularity, Slo, Workload
from loraplex_client.transport import DEFAULT_ADDRESS

DEFAULT_ALPHA: Final = 1.5
MAX_REQUESTS: Final = 100_000
MAX_TOKENS: Final = 1_000_000
MAX_RATE: Final = 100_000.0
MAX_SECONDS: Final = 86_400.0
_REPEATS_WITH_BASELINE: Final = 3
_POPULARITIES: Final = "identical, distinct, uniform, skewed, skewed:ALPHA (ALPHA a number above 0)"
_ARRIVALS: Final = "closed:CONCURRENCY, poisson:RATE, gamma:RATE:CV (RATE in requests a second)"
_SLOS: Final = "ttft, tpot and e2e, each with seconds, as in ttft=500ms,tpot=0.05"
_DURATION: Final = re.compile(r"(?P<number>[0-9.eE+-]+)(?P<unit>ms|s|)")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    server: str
    workload: Workload
    slo: Slo | None
    #: the server's Prometheus exposition, to compare with; "" for none
    metrics: str
    #: seconds that a request may take
    timeout_s: float
    #: seconds after which the load is stopped, warm-up included; None for no bound
    max_seconds: float | None
    out: Path


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line. Exits with code 2 and one line when something in it is not possible."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _options(args)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


def adapters(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    if "" in names:
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; allowed are names separated by single commas")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise argparse.ArgumentTypeError(f"{text!r} names {', '.join(twice)} more than once; allowed is each name once")
    return names


def popularity(text: str) -> Popularity:
    """``identical``, ``distinct``, ``uniform``, ``skewed`` or ``skewed:ALPHA``."""
    kind, colon, alpha = text.partition(":")
    value = _number(alpha) if colon else None
    match kind, colon, value:
        case ("identical" | "distinct" | "uniform") as even, "", None:
            return Popularity(even)
        case "skewed", "", None:
            return Popularity("skewed", DEFAULT_ALPHA)
        case "skewed", ":", float(given) if 0 < given <= 100:
            return Popularity("skewed", given)
    raise argparse.ArgumentTypeError(f"{text!r} is no popularity; allowed are {_POPULARITIES}")


def arrival(text: str) -> Arrival:
    """``closed:CONCURRENCY``, ``poisson:RATE`` or ``gamma:RATE:CV``."""
    kind, *rest = text.split(":")
    numbers = [_number(part) for part in rest]
    match kind, numbers:
        case "closed", [float(concurrency)] if concurrency.is_integer() and 1 <= concurrency <= MAX_REQUESTS:
            return Arrival("closed", concurrency=int(concurrency))
        case "poisson", [float(rate)] if 0 < rate <= MAX_RATE:
            return Arrival("poisson", rate=rate)
        case "gamma", [float(rate), float(cv)] if 0 < rate <= MAX_RATE and 0.01 <= cv <= 100:
            return Arrival("gamma", rate=rate, cv=cv)
    raise argparse.ArgumentTypeError(f"{text!r} is no arrival; allowed are {_ARRIVALS}")


def lengths(text: str) -> Lengths:
    """``N`` or ``LO-HI``."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if match:
        low = int(match[1])
        high = int(match[2] or low)
        if 1 <= low <= high <= MAX_TOKENS:
            return Lengths(low, high)
    raise argparse.ArgumentTypeError(f"{text!r} is no length; allowed are N and LO-HI, from 1 to {MAX_TOKENS} tokens")


def slo(text: str) -> Slo:
    """``ttft=SECONDS,tpot=SECONDS,e2e=SECONDS``, at least one; ``250ms`` is 0.25."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        seconds = _duration(value)
        if name not in ("ttft", "tpot", "e2e") or name in limits or seconds is None:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} is no limit; allowed are {_SLOS}")
        limits[name] = seconds
    return Slo(limits.get("ttft"), limits.get("tpot"), limits.get("e2e"))


def metrics_url(text: str) -> str:
    """An http address."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no metrics address; allowed are http://HOST:PORT/metrics and https"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description="Load a running server and report. Exit codes: 0 the load ran to its end (or to --max-seconds), "
        "1 it could not, 2 impossible options, 130 interrupted; what was measured until then is reported all the same.",
    )
    add = parser.add_argument
    add("--server", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    add("--adapters", type=adapters, default=(), metavar="A,B,C", help="most popular first; none: the base model alone")
    add("--popularity", type=popularity, default="uniform", metavar="P", help=f"{_POPULARITIES}; default %(default)s")
    add("--arrival", type=arrival, default="closed:8", metavar="A", help=f"{_ARRIVALS}; default %(default)s")
    add("--prompt-tokens", type=lengths, default="128", metavar="N|LO-HI", help="default %(default)s")
    add("--output-tokens", type=lengths, default="64", metavar="N|LO-HI", help="default %(default)s")
    add(
        "--num-requests", type=_whole(1, MAX_REQUESTS), default=64, metavar="N", help="in each run; default %(default)s"
    )
    add("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="S", help="default %(default)s")
    add("--baseline", choices=("none", "base"), default="none", help="base: run the same requests without adapters too")
    add(
        "--repeats",
        type=_whole(1, 1000),
        metavar="N",
        help="runs of each side, taking turns; default 1, with a baseline 3",
    )
    add(
        "--warmup",
        type=_whole(0, MAX_REQUESTS),
        metavar="N",
        help="not measured; default 2 for each adapter and the base",
    )
    add("--slo", type=slo, metavar="LIMITS", help=f"what goodput counts: {_SLOS}")
    add("--metrics", type=metrics_url, metavar="URL", help="compare with the server's own metrics there")
    add("--timeout", type=_seconds, default=120.0, metavar="S", help="for one request; default %(default)g s")
    add("--max-seconds", type=_seconds, metavar="S", help="stop the load after that long and report it as partial")
    add("--out", type=Path, required=True, metavar="DIR", help="where load.json, report.html and the plots go")
    return parser


def _options(args: argparse.Namespace) -> Options:
    if args.baseline == "base" and not args.adapters:
        raise argparse.ArgumentTypeError(
            "--baseline base needs --adapters to compare with; allowed without them is none"
        )
    if (args.arrival.concurrency or 0) > args.num_requests:
        raise argparse.ArgumentTypeError(
            f"--arrival {args.arrival} never has {args.arrival.concurrency} requests in flight with --num-requests "
            f"{args.num_requests}; allowed is a concurrency up to that"
        )
    workload = Workload(
        adapters=args.adapters,
        popularity=args.popularity,
        arrival=args.arrival,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        num_requests=args.num_requests,
        seed=args.seed,
        baseline=args.baseline,
        repeats=args.repeats or (_REPEATS_WITH_BASELINE if args.baseline == "base" else 1),
        warmup=2 * (len(args.adapters) + 1) if args.warmup is None else args.warmup,
    )
    return Options(args.server, workload, args.slo, args.metrics or "", args.timeout, args.max_seconds, args.out)


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _duration(text: str) -> float | None:
    """Seconds above 0, or None."""
    match = _DURATION.fullmatch(text)
    value = _number(match["number"]) if match else None
    if match is None or value is None:
        return None
    seconds = value / 1000 if match["unit"] == "ms" else value
    return seconds if 0 < seconds <= MAX_SECONDS else None


def _seconds(text: str) -> float:
    seconds = _duration(text)
    if seconds is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; allowed are seconds above 0, up to {MAX_SECONDS:g}")
    return seconds


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number from {low} to {high}")
        return int(text)

    return whole
