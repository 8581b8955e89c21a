"""From what a session measured to the document: summaries of runs and sides, and what a reader must be warned of."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench.machine import machine, shown_command, versions
from bench.serve.compare import Comparison, compare, total
from bench.serve.document import (
    SCHEMA,
    AdapterFacts,
    Distribution,
    Document,
    RequestRecord,
    Retention,
    Run,
    ServerFacts,
    SideResult,
    Timeline,
)
from bench.serve.load import OK, UNFINISHED, Outcome, Stop
from bench.serve.measures import (
    DEFINITIONS,
    distribution,
    e2es,
    is_good,
    latency,
    summarize,
    token_gaps,
    tpots,
    ttfts,
)
from bench.serve.options import Options
from bench.serve.session import Measured, Session
from bench.serve.workload import BASE, Slo
from loraplex_client import Model

PACKAGES: Final = ("grpcio", "protobuf", "msgspec", "numpy", "matplotlib")
_TIMELINE_BINS: Final = 60
_LEAST_BIN_S: Final = 0.25
#: a sender that is later than this share of the mean TTFT, or whose process is this busy, measures itself
_LAG_SHARE: Final = 0.05
_BUSY_CORES: Final = 0.8
_CACHED_SHARE: Final = 0.01
#: runs of one side that differ by more than this were disturbed
_SPREAD: Final = 0.2
_LEAST_S: Final = 1e-9


def make_document(session: Session, options: Options, stop: Stop | None, command: Sequence[str]) -> Document:
    """Everything that is known of one load."""
    workload = options.workload
    runs = [_run(measured, options.slo) for measured in session.runs]
    outcomes = [outcome for measured in session.runs for outcome in measured.played.outcomes]
    planned = workload.num_requests * workload.repeats * len(workload.sides)
    ended = sum(outcome.code != UNFINISHED for outcome in outcomes)
    comparison = _comparison(session, options)
    return Document(
        schema=SCHEMA,
        partial=ended < planned,
        stopped=stop.kind if stop and ended < planned else "",
        stop_message=stop.message if stop and ended < planned else "",
        requests_planned=planned,
        requests_ended=ended,
        command=shown_command(command),
        started_at=_clock(session.started_at),
        finished_at=_clock(session.finished_at),
        machine=machine(),
        versions=versions(PACKAGES),
        server=_server(session.model, options.server),
        adapters=[AdapterFacts(a.name, a.kind, a.max_rank, a.bytes, a.uid) for a in session.adapters.values()],
        workload=workload,
        slo=options.slo,
        timeout_s=options.timeout_s,
        definitions=DEFINITIONS,
        warnings=list(_warnings(session, options, runs, comparison)),
        sides=_sides(session.runs, options.slo),
        retention=Retention.of(runs),
        comparison=comparison,
        runs=runs,
    )


def _run(measured: Measured, slo: Slo | None) -> Run:
    played = measured.played
    duration_s = max(played.duration_s, _LEAST_S)
    open_loop = any(outcome.planned.due_s is not None for outcome in played.outcomes)
    return Run(
        side=measured.side,
        repeat=measured.repeat,
        started_s=measured.started_s,
        planned=played.num_planned,
        complete=played.complete,
        summary=summarize(played.outcomes, duration_s, slo),
        send_lag_s=latency(outcome.lag_s for outcome in played.outcomes) if open_loop else None,
        client_cores=played.client_cpu_s / duration_s,
        timeline=_timeline(played.outcomes, duration_s),
        requests=[_request(outcome, slo) for outcome in played.outcomes],
    )


def _request(outcome: Outcome, slo: Slo | None) -> RequestRecord:
    planned = outcome.planned
    return RequestRecord(
        index=planned.index,
        adapter=planned.adapter or BASE,
        prompt_tokens=len(planned.prompt),
        output_tokens=planned.output_tokens,
        due_s=None if planned.due_s is None else _rounded(planned.due_s),
        sent_s=_rounded(outcome.sent_s),
        first_token_s=_rounded(outcome.chunk_s[0]) if outcome.chunk_s else None,
        ended_s=_rounded(outcome.ended_s),
        tokens=outcome.num_tokens,
        code=outcome.code,
        good=None if slo is None else is_good(outcome, slo),
    )


def _timeline(outcomes: Sequence[Outcome], duration_s: float) -> Timeline:
    bin_s = max(_LEAST_BIN_S, duration_s / _TIMELINE_BINS)
    tokens = [0] * (int(duration_s / bin_s) + 1)
    for outcome in outcomes:
        for at, count in zip(outcome.chunk_s, outcome.chunk_tokens, strict=True):
            tokens[min(int(at / bin_s), len(tokens) - 1)] += count
    return Timeline(bin_s, tokens)


def _sides(runs: Sequence[Measured], slo: Slo | None) -> dict[str, SideResult]:
    by_side: dict[str, list[Measured]] = defaultdict(list)
    for measured in runs:
        by_side[measured.side].append(measured)
    return {side: _side(measured, slo) for side, measured in sorted(by_side.items())}


def _side(runs: Sequence[Measured], slo: Slo | None) -> SideResult:
    duration_s = max(sum(run.played.duration_s for run in runs), _LEAST_S)
    outcomes = [outcome for run in runs for outcome in run.played.outcomes]
    by_adapter: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_adapter[outcome.planned.adapter or BASE].append(outcome)
    done = [outcome for outcome in outcomes if outcome.code == OK]
    return SideResult(
        all=summarize(outcomes, duration_s, slo),
        adapters={name: summarize(group, duration_s, slo) for name, group in sorted(by_adapter.items())},
        distribution=Distribution(
            ttft_s=distribution(ttfts(done)),
            tpot_s=distribution(tpots(done)),
            itl_s=distribution(token_gaps(done)),
            e2e_s=distribution(e2es(done)),
        ),
    )


def _comparison(session: Session, options: Options) -> Comparison | None:
    counted = [run for run in session.runs if run.window is not None]
    if not counted:
        return None
    window = total(run.window for run in counted if run.window is not None)
    return compare(options.metrics, window, [outcome for run in counted for outcome in run.played.outcomes])


def _warnings(session: Session, options: Options, runs: Sequence[Run], comparison: Comparison | None) -> Iterator[str]:
    summaries = [run.summary for run in runs]
    sent = sum(summary.sent for summary in summaries)
    failed = sum(summary.failed for summary in summaries)
    if failed:
        codes = sorted({code for summary in summaries for code in summary.errors})
        yield (
            f"{failed} of {sent} requests failed ({', '.join(codes)}): they are in no latency and no rate, and count "
            "against goodput"
        )
    cut_off = sum(summary.cut_off for summary in summaries)
    if cut_off:
        yield (
            f"{cut_off} of {sent} requests were cut off when the load was stopped: the longest are missing from the "
            "latencies, which look better than they are"
        )
    short = sum(summary.short for summary in summaries)
    if short:
        yield f"{short} requests completed with fewer tokens than were asked for"
    yield from _idle_warnings(session)
    warm_up_failed = sum(outcome.code not in (OK, UNFINISHED) for outcome in session.warm_up)
    if warm_up_failed:
        yield f"{warm_up_failed} of {len(session.warm_up)} warm-up requests failed"
    cached = sum(summary.cached_prompt_tokens for summary in summaries)
    prompt = sum(summary.prompt_tokens for summary in summaries)
    if cached > _CACHED_SHARE * prompt:
        yield (
            f"the server had {cached / prompt:.0%} of the prompt tokens in its prefix cache, so TTFT and rates flatter "
            "it: were these requests sent to it before? Another --seed makes new ones"
        )
    yield from _spread_warnings(runs)
    yield from _client_warnings(runs)
    if options.metrics and comparison is None:
        yield "the server's metrics could not be read after the runs, so there is nothing to compare with"
    elif comparison is not None and not comparison.all_ok:
        wrong = sum(not value.ok for value in comparison.values)
        yield f"{wrong} of the client's numbers differ from the server's own (see the comparison)"


def _idle_warnings(session: Session) -> Iterator[str]:
    """An aLoRA whose invocation tokens the prompts do not hold costs what the base costs, and measures nothing else."""
    idle = Counter(o.planned.adapter for run in session.runs for o in run.played.outcomes if o.idle)
    for name, count in sorted(idle.items()):
        yield (
            f"adapter {name} was not invoked by {count} of its requests: their prompts hold none of its invocation "
            "tokens, so the base model alone answered them and its numbers are the base's"
        )


def _spread_warnings(runs: Sequence[Run]) -> Iterator[str]:
    """A closed loop keeps its speed on a machine that is left alone; an open loop's follows the arrivals it drew."""
    closed = [run for run in runs if run.flawless and run.send_lag_s is None]
    for side in ("adapters", "base"):
        speeds = [run.summary.output_tokens_per_s for run in closed if run.side == side]
        if len(speeds) > 1 and max(speeds) > (1 + _SPREAD) * min(speeds):
            yield (
                f"the runs of one side ({side}) differ: {min(speeds):,.0f} to {max(speeds):,.0f} output tok/s. Was the "
                "machine busy with something else?"
            )


def _client_warnings(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        name = f"run {run.repeat}, {run.side}"
        lag, ttft = run.send_lag_s, run.summary.ttft_s
        if lag is not None and ttft is not None and lag.p99 > _LAG_SHARE * ttft.mean:
            yield (
                f"{name}: the sender itself was late, by {lag.p99 * 1000:.0f} ms at p99 (mean TTFT "
                f"{ttft.mean * 1000:.0f} ms): the server was loaded less evenly than asked for"
            )
        if run.client_cores > _BUSY_CORES:
            yield f"{name}: the client used {run.client_cores:.0%} of a core, so it may be what was measured"


def _server(model: Model, address: str) -> ServerFacts:
    return ServerFacts(
        address=address,
        same_machine=_is_loopback(address),
        version=model.server_version,
        model=Path(model.id).name if Path(model.id).is_absolute() else model.id,
        architecture=model.architecture,
        dtype=model.dtype,
        device=model.device,
        quantization=model.quantization,
        tensor_parallel_size=model.tensor_parallel_size,
        weight_bytes=model.weight_bytes,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        max_num_seqs=model.limits.max_num_seqs,
        max_num_batched_tokens=model.limits.max_num_batched_tokens,
        backends=dict(sorted(model.backends.items())),
    )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].removeprefix("ipv4:").removeprefix("ipv6:").strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _rounded(seconds: float) -> float:
    return round(seconds, 5)
