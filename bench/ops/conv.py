"""The causal convolution at one model's channels: backends beside plain torch."""

from __future__ import annotations

from functools import partial

import torch

from bench.ops.mixer import Mixer, make_mixer
from bench.ops.mixer_formulations import FORMULATIONS
from bench.ops.mixer_ways import checked_way
from bench.ops.options import Options
from bench.ops.report import Report, Row, report
from bench.ops.timing import Stopwatch, Way, measure, num_sets, stopwatch_for
from loraplex_kernels.backend import choose_conv


def run(options: Options, stopwatch: Stopwatch | None = None) -> Report:
    """Time every step, one layer of it, with states that come from memory, as those of many layers do. Raises
    WrongResult before it reports the time of a wrong way, and ValueError for a backend that cannot run on the device.

    ``prepare`` of each backend, once a step for all layers, is timed on its own.
    """
    stopwatch = stopwatch or stopwatch_for(options.device, cold_host=True)
    names = dict.fromkeys(choose_conv(name, options.device).name for name in options.backends)
    rows = []
    for step in options.shapes.state_steps:
        mixer = make_mixer(options, step)
        expected = _convolve("reference", mixer.copied())[0]()
        sets = num_sets(stopwatch, mixer.conv_bytes)
        ways = []
        for name in names:
            made = [_convolve(name, mixer.copied()) for _ in range(sets)]
            ways.append(checked_way(name, step, expected, made))
            prepare = partial(choose_conv(name, options.device).prepare, mixer.spans, options.device)
            ways.append(Way(f"{name}: prepare", (prepare,)))
        plain = [(FORMULATIONS["conv"](mixer.copied()), True) for _ in range(sets)]
        ways.append(checked_way("torch", step, expected, plain))
        timings = measure(ways, stopwatch, repeats=options.repeats, calls=options.calls)
        rows.append(Row(step.name, "", mixer.conv_bytes, sets, timings))
    return report("conv", options, stopwatch.copy_bytes_per_s(), tuple(rows), model=options.shapes.mixer.name)


def _convolve(name: str, mixer: Mixer) -> tuple[partial[torch.Tensor], bool]:
    """A call, and whether it can be captured: decodes by a static plan, where the backend has them."""
    device, spans = mixer.projected.device, mixer.spans
    backend = choose_conv(name, device)
    static = backend.static_plan(len(spans), device) if mixer.decodes == len(spans) else None
    captured = static is not None and static.set(spans)
    plan = static if static is not None and captured else backend.prepare(spans, device)
    return partial(backend.convolve, mixer.conv_input, mixer.weights, mixer.conv_states, plan), captured
