"""Two ranks beside one: the same tokens, with graphs and without; how fast decode is; what one sum over ranks takes.

Engines are started as a server starts them. In float32, on a model of real widths and few layers, tokens must be equal.
In bfloat16, on the whole model, sums round in another order, so that equal tokens would be luck: there the logprobs of
the tokens must be near, from the first one to the first that differs.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu_check.adapter_files import write_lora, write_scales, write_tokens
from bench.gpu_check.agreement import DifferentTokens, clear_ones, compare_near, compare_tokens
from bench.gpu_check.decode import Steps, steps_for
from bench.gpu_check.dummy import shape_of, write_config
from bench.gpu_check.group_sums import RANKS, time_sums
from bench.gpu_check.section import OutOfTime, Row, Section, Setting
from bench.gpu_check.served import Answer, ServedEngine, served
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig, ServerConfig
from loraplex.types import AdapterRef, OutputOptions, Request, SamplingParams, StopRule

#: the section ends by then: others come after it
LIMIT_S = 200.0
#: three batches of some fifty steps
CELL_S = 3.0
LORAS = 8
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """``layers`` of the model whose tokens must be equal, ``tokens`` of each of its answers, ``prompts`` for each
    adapter, and (batch, distinct adapters) of what is timed."""

    layers: int
    tokens: int
    prompts: int
    cells: tuple[tuple[int, int], ...]


FULL = Sizes(4, 24, 4, ((1, 1), (8, 8), (32, 8), (64, 8), (8, 1), (64, 1)))
DRY = Sizes(2, 8, 3, ((1, 1), (3, 2)))


def run(setting: Setting) -> Iterator[Row]:
    """Rows of tokens, of logprobs, of speed at each number of ranks, and of sums."""
    setting = replace(setting, deadline_s=min(setting.deadline_s, time.monotonic() + LIMIT_S))
    sizes = DRY if setting.dry else FULL
    if not setting.dry:  # what other sections have left is in the way of one rank of ours
        gc.collect()
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
        yield from _equal_tokens(setting, sizes, Path(folder) / "tokens")
        yield from _speeds(setting, sizes, Path(folder) / "speed")
    shape = shape_of(setting.dry)
    yield from time_sums(
        setting, shape.hidden_size, shape.vocab_size, tuple(sorted({batch for batch, _ in sizes.cells}))
    )


def lacks(setting: Setting) -> str:
    """What this machine does not have; a dry run's ranks are CPUs of one machine."""
    if find_spec("zmq") is None:
        return "needs the package pyzmq"
    if setting.dry:
        return ""
    count = torch.cuda.device_count()
    if count < RANKS:  # NCCL refuses two ranks on one GPU
        return f"needs two GPUs, {'one is' if count else 'none is'} here"
    names = [torch.cuda.get_device_name(index) for index in range(RANKS)]
    if len(set(names)) > 1:
        return f"needs two GPUs of one kind, here are {' and '.join(names)}: they make different random weights"
    if not torch.distributed.is_nccl_available():
        return "needs a torch that was built with NCCL"
    return ""


# ---- the same tokens ----


def _equal_tokens(setting: Setting, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Float32: a batch that graphs serve, of adapters that need different ones, and then the same beside an adapter
    with rows of its own, for which the whole batch runs without."""
    shape = replace(shape_of(setting.dry), num_layers=sizes.layers)
    for seed, (name, write) in enumerate({"lora": write_lora, "ia3": write_scales, "tokens": write_tokens}.items()):
        write(folder / name, shape, seed, torch.float32)
    names = ("", "lora", "ia3", "tokens")
    batches = {"adapters of tables": names[:-1], "with own rows": names}
    # without graphs first: where only captured sums are wrong, that is seen
    runs = [(1, "off"), (RANKS, "off"), *([] if setting.dry else [(RANKS, "on")])]
    expected: Mapping[str, Answer] = {}
    for ranks, graphs in runs:
        with served(setting, _config(setting, write_config(shape, folder), "float32", ranks, graphs)) as engine:
            for name in names[1:]:
                engine.load(name, folder / name)
            if ranks == 1:
                asked = _requests(names, sizes.prompts, sizes.tokens, logprobs=2)
                expected = clear_ones(_answers(engine, asked))
                continue
            for batch, some in batches.items():
                asked = _requests(some, sizes.prompts, sizes.tokens, logprobs=0)
                found = _answers(engine, [request for request in asked if request.request_id in expected])
                wrong = compare_tokens(expected, found)
                yield {
                    "what": "tokens in float32",
                    "ranks": ranks,
                    "graphs": graphs,
                    "batch_of": batch,
                    "requests": len(found),
                    "left_out_as_too_close": len(asked) - len(found),
                    "tokens": sum(len(answer.token_ids) for answer in found.values()),
                    "wrong_requests": len(wrong),
                }
                if wrong:
                    raise DifferentTokens(f"{ranks} ranks, graphs {graphs}, {batch}: {wrong[0]}")


def _requests(names: Sequence[str], prompts: int, tokens: int, *, logprobs: int) -> list[Request]:
    """``prompts`` of different lengths, each of them for every adapter."""
    return [
        Request(
            request_id=f"{name or 'base'}-{number}",
            prompt_token_ids=tuple((number * 31 + position * 7) % 59 for position in range(5 + 3 * number)),
            adapters=(AdapterRef(name),) if name else (),
            sampling=SamplingParams(temperature=0.0, seed=0),
            stop=StopRule(max_tokens=tokens, ignore_eos=True),
            output=OutputOptions(logprobs=logprobs),
        )
        for name in names
        for number in range(prompts)
    ]


def _answers(engine: ServedEngine, requests: Sequence[Request]) -> dict[str, Answer]:
    return dict(zip([request.request_id for request in requests], engine.answers(requests), strict=True))


# ---- how fast ----


def _speeds(setting: Setting, sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Each number of ranks in turn: logprobs of some answers, then steps without adapters and with them."""
    shape, steps = shape_of(setting.dry), steps_for(setting)
    names = [f"lora-{number}" for number in range(2 if setting.dry else LORAS)]
    for seed, name in enumerate(names):
        write_lora(folder / name, shape, seed, setting.dtype)
    dtype = str(setting.dtype).removeprefix("torch.")
    expected: Mapping[str, Answer] = {}
    step_s: dict[tuple[int, int], float] = {}
    for ranks in (1, RANKS):
        graphs = "off" if setting.dry else "on"
        with served(setting, _config(setting, write_config(shape, folder), dtype, ranks, graphs)) as engine:
            for name in names:
                engine.load(name, folder / name)
            found = _answers(engine, _requests(("", *names[:2]), sizes.prompts, sizes.tokens, logprobs=4))
            if ranks > 1:
                yield {
                    "what": f"logprobs in {dtype}",
                    "ranks": ranks,
                    "graphs": graphs,
                    **compare_near(expected, found),
                }
            expected = found
            for cell in sizes.cells:
                if setting.left_s() < CELL_S and not setting.dry:
                    raise OutOfTime(f"before {ranks} ranks, batch {cell[0]}, {cell[1]} adapters")
                row = _cell(engine, steps, names, cell)
                one = step_s.setdefault(cell, float(row["step_ms"]))
                yield {"ranks": ranks, "graphs": graphs, **row, "times_one_rank": one / float(row["step_ms"])}


def _cell(engine: ServedEngine, steps: Steps, names: Sequence[str], cell: tuple[int, int]) -> dict[str, int | float]:
    batch, distinct = cell
    base_s = engine.step_s(("",) * batch, steps)
    adapters_s = engine.step_s([names[row * distinct // batch] for row in range(batch)], steps)
    base_s = (base_s + engine.step_s(("",) * batch, steps)) / 2
    return {
        "batch": batch,
        "distinct": distinct,
        "base_step_ms": base_s * 1e3,
        "step_ms": adapters_s * 1e3,
        "base_tokens_per_s": batch / base_s,
        "tokens_per_s": batch / adapters_s,
        "retention": base_s / adapters_s,
    }


def _config(setting: Setting, folder: Path, dtype: str, ranks: int, graphs: str) -> Config:
    """As a server would have it, with adapters from ``folder``, where config.json is as well."""
    return Config(
        model=ModelConfig(
            model=str(folder),
            device=setting.device.type,
            dtype=dtype,
            load_format="dummy",
            tensor_parallel_size=ranks,
            max_model_len=64 if setting.dry else 512,
        ),
        engine=EngineConfig(
            max_num_seqs=16 if setting.dry else 64,
            max_num_batched_tokens=64 if setting.dry else 4096,
            prefix_cache=False,  # the same prompts come again and again
            kv_cache_memory=(1 << 22) if setting.dry else 4 * _GIB,
            graphs="on" if graphs == "on" else "off",
        ),
        adapters=AdaptersConfig(adapter_memory=(1 << 24) if setting.dry else 2 * _GIB, adapter_dirs=(str(folder),)),
        server=ServerConfig(log_level="warning"),
    )


SECTION = Section("ranks", run, 60.0, lacks)
