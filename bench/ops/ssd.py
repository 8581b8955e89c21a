"""The state-space scan and its gate at one model's heads: backends beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from bench.ops.mixer import Mixer, make_mixer
from bench.ops.mixer_formulations import FORMULATIONS
from bench.ops.mixer_ways import checked_way
from bench.ops.options import Options
from bench.ops.report import Report, Row, report
from bench.ops.shapes import StateStep
from bench.ops.timing import Stopwatch, Way, measure, num_sets, stopwatch_for
from loraplex_kernels.backend import choose_ssd


def run(options: Options, stopwatch: Stopwatch | None = None) -> Report:
    """Time scan and gate of every step, one layer of it, with states that come from memory, as those of many layers
    do. Raises WrongResult before it reports the time of a wrong way, and ValueError for a backend that cannot run on
    the device.

    ``prepare`` of each backend, once a step for all layers, is timed on its own.
    """
    stopwatch = stopwatch or stopwatch_for(options.device, cold_host=True)
    rows = [_row(options, stopwatch, step, part) for step in options.shapes.state_steps for part in PARTS]
    return report("ssd", options, stopwatch.copy_bytes_per_s(), tuple(rows), model=options.shapes.mixer.name)


def _row(options: Options, stopwatch: Stopwatch, step: StateStep, part: str) -> Row:
    mixer, call = make_mixer(options, step), PARTS[part]
    num_bytes = mixer.scan_bytes if part == "scan" else mixer.gate_bytes
    expected = call("reference", mixer.copied())[0]()
    sets = num_sets(stopwatch, num_bytes)
    ways = []
    for name in dict.fromkeys(choose_ssd(name, options.device).name for name in options.backends):
        ways.append(checked_way(name, step, expected, [call(name, mixer.copied()) for _ in range(sets)]))
        # the gate needs no plan, but all rows of a table have the same columns
        prepare = partial(choose_ssd(name, options.device).prepare, mixer.spans, options.device)
        ways.append(Way(f"{name}: prepare", (prepare,)))
    plain = [(FORMULATIONS[part](mixer.copied()), True) for _ in range(sets)]
    ways.append(checked_way("torch", step, expected, plain))
    return Row(step.name, part, num_bytes, sets, measure(ways, stopwatch, repeats=options.repeats, calls=options.calls))


def _scan(name: str, mixer: Mixer) -> tuple[partial[torch.Tensor], bool]:
    """A call, and whether it can be captured: decodes by a static plan, where the backend has them."""
    device, spans = mixer.projected.device, mixer.spans
    backend = choose_ssd(name, device)
    static = backend.static_plan(len(spans), device) if mixer.decodes == len(spans) else None
    captured = static is not None and static.set(spans)
    plan = static if static is not None and captured else backend.prepare(spans, device)
    return partial(backend.scan, mixer.inputs, mixer.parameters, mixer.ssd_states, plan), captured


def _gate(name: str, mixer: Mixer) -> tuple[partial[torch.Tensor], bool]:
    """A call, which reads no plan; rows of x stand for y."""
    backend = choose_ssd(name, mixer.projected.device)
    y = mixer.inputs.x.flatten(1).contiguous()
    return partial(backend.gate, y, mixer.z, mixer.norm), mixer.decodes == len(mixer.rows)


PARTS: Mapping[str, Callable[[str, Mixer], tuple[partial[torch.Tensor], bool]]] = MappingProxyType(
    {"scan": _scan, "gate": _gate}
)
