"""Kinds of all forms under captured graphs, and on a GPU: in one batch, each sequence's tokens are PEFT's (float32)."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import msgspec
import pytest
import torch

from loraplex.engine import rank as engine_rank
from loraplex.engine.local import LocalEngine
from loraplex.types import AdapterRef, OnConflict
from tests.engines import in_random_arrival, local_engine
from tests.fakes_graphs import RerunCapture, TapeAttention, TapeCapture, TapeLora
from tests.kind_matrix import Case, KindMatrix

#: the forms that a table has: factors, their sums' widths, scales of outputs and of inputs, shifts; and a start
TABLE_KINDS = ("lora", "lora-bias-only", "dora", "vera", "loha", "ia3", "alora")
#: whose steps run without graphs
ROW_KINDS = ("ln-tuning", "trainable-tokens", "lora-saved-head", "ia3-up", "lora-added-vocabulary")

no_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter: there is no triton, or it compiles for the GPU of this machine",
)
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def matrix(kinds_root: Path) -> KindMatrix:
    torch.set_num_threads(1)
    return KindMatrix(kinds_root, "qwen3", tied=False)


def engine_for(matrix: KindMatrix, names: tuple[str, ...], **settings: object) -> LocalEngine:
    engine = local_engine(
        matrix.base_dir,
        adapter_dirs=(matrix.root,),
        **{"kv_page_size": 4, "max_num_batched_tokens": 64, "max_num_seqs": 6, **settings},
    )
    for name in names:
        engine.load_adapter(name, str(matrix.adapter(name)))
    return engine


def check(engine: LocalEngine, cases: list[Case]) -> None:
    """In random order and arrival."""
    rng = random.Random(3)
    rng.shuffle(cases)
    got = in_random_arrival(engine, [case.request for case in cases], rng, most=1)
    assert [g.failure for g in got if g.failure] == []
    wanted = {case.request.request_id: case.expected for case in cases}
    assert {case.request.request_id: tuple(g.token_ids) for case, g in zip(cases, got, strict=True)} == wanted


def cases_of(matrix: KindMatrix, *names: str) -> list[Case]:
    return [case for name in names for case in matrix.cases(name)]


@pytest.mark.parametrize("mode", ["none", "eager"])
def test_all_forms_of_tables_are_served_by_graphs(
    matrix: KindMatrix, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    capture = TapeCapture()
    engine = engine_for(matrix, TABLE_KINDS, mode=mode, capture=capture)
    for name in TABLE_KINDS:
        before, steps = capture.replayed, len(engine.reports)
        check(engine, cases_of(matrix, name, ""))
        decodes = [report for report in engine.reports[steps:] if report.decode_tokens and not report.prefill_tokens]
        assert capture.replayed - before == len(decodes) > 0, f"{name}: not every decode step was a graph's"
    check(engine, cases_of(matrix, "", *TABLE_KINDS))
    for name in TABLE_KINDS:
        engine.unload_adapter(name)
    check(engine, cases_of(matrix, ""))


@no_interpreter
def test_triton_kernels_serve_all_forms_from_static_plans(matrix: KindMatrix) -> None:
    capture = RerunCapture()
    backends = {"lora_backend": "triton", "attention_backend": "triton", "graphs": "on"}
    engine = engine_for(matrix, ("ia3", "dora"), capture=capture, max_num_seqs=4, **backends)
    check(engine, [*cases_of(matrix, "ia3", "dora")[::2], *cases_of(matrix, "")[:1]])
    assert capture.replayed >= 4


@pytest.mark.parametrize(
    ("lora_backend", "graphs"),
    [pytest.param(b, g, marks=on_a_gpu) for b in ("triton", "triton-fused") for g in ("on", "off")],
)
def test_every_kind_on_a_gpu(matrix: KindMatrix, lora_backend: str, graphs: str) -> None:
    """All in one batch, own rows and added vocabulary, activated adapters and the prefix cache among them."""
    settings = {"device": "cuda", "lora_backend": lora_backend, "graphs": graphs, "max_num_seqs": 24}
    engine = engine_for(matrix, matrix.names, **{**settings, "kv_page_size": 16})
    check(engine, [*matrix.all_cases(), *matrix.all_cases()])
    assert max(report.adapters for report in engine.reports) >= 8
    assert sum(g.usage.cached_prompt_tokens for g in engine.generations.values()) > 0
    for name in matrix.names:
        engine.unload_adapter(name)
    assert not any(ref.rows.held for ref in engine.core._steps.executor.runner.model.tables().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds_when_it_probes(matrix: KindMatrix) -> None:
    """One adapter after another, in the slots that the last have left, while a request runs."""
    names = TABLE_KINDS + ROW_KINDS
    cpu, gpu = (engine_for(matrix, (), device=device, max_num_seqs=4) for device in ("cpu", "cuda"))
    running = gpu.submit(matrix.long_request(""))
    for name in names:
        found = []
        for engine in (cpu, gpu):
            probe = engine.load_adapter(name, str(matrix.adapter(name))).probe
            assert probe is not None
            found.append(probe)
            engine.unload_adapter(name)
        assert found[1].max_change == pytest.approx(found[0].max_change, rel=1e-3), name
        assert found[1].top_changed == pytest.approx(found[0].top_changed, abs=0.08), name
    gpu.run_until_idle()
    assert tuple(gpu.generations[running].token_ids) == tuple(
        matrix.oracle("").greedy(matrix.long_request("").prompt_token_ids, 5)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_own_rows_given_back_on_a_gpu_are_not_read_by_steps_in_flight(matrix: KindMatrix) -> None:
    """Loaded, asked for and replaced between launched steps: memory is given out again behind its readers."""
    engine = engine_for(matrix, (), device="cuda")
    tickets = []
    for turn in range(12):
        name = ROW_KINDS[turn % 3]
        case = matrix.cases(name)[turn % 2]
        request = msgspec.structs.replace(case.request, adapters=(AdapterRef("changing"),))
        engine.load_adapter("changing", str(matrix.adapter(name)), OnConflict.REPLACE)
        torch.full((1 << 18,), float("nan"), device="cuda")  # whoever reads freed memory reads this
        tickets.append((engine.submit(request), case))
        for _ in range(2):  # it runs on while the next version is loaded
            engine.turn()
    engine.run_until_idle()
    for ticket, case in tickets:
        assert tuple(engine.generations[ticket].token_ids) == case.expected
