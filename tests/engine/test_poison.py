"""Poison must not travel: NaN, Inf and huge values of one sequence leave its neighbours' tokens as they are alone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from loraplex.engine.local import LocalEngine
from loraplex.errors import InvalidAdapter
from loraplex.types import AdapterRef, FinishReason, Request, StopRule
from loraplex_kernels.attention import SequenceSpan
from tests.engines import local_engine, make_adapters
from tests.oracle import Oracle
from tests.tiny import prompt, tiny_checkpoint

NEIGHBOURS = (None, "all", "one", "vocabulary")
#: backend, and how steps overlap
CASES = (("reference", "none"), ("cpu", "none"), ("cpu", "eager"), ("cpu", "lazy"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poison")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return tiny_checkpoint(root, "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(root: Path, base: Path) -> dict[str, Path]:
    return make_adapters(base, root / "adapters", ("all", "one", "vocabulary"))


def spoiled(source: Path, target: Path, key: str, value: float) -> Path:
    """A copy of an adapter with one element of every tensor named ``*key*`` replaced."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if key in name and "base_layer" not in name:
            tensor.view(-1)[tensor.numel() // 2] = value
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def request(name: str | None, seed: int, *, prompt_tokens: int = 9, max_tokens: int = 10) -> Request:
    return Request(
        f"r{seed}",
        prompt(prompt_tokens, seed=seed),
        adapters=() if name is None else (AdapterRef(name),),
        stop=StopRule(max_tokens=max_tokens, ignore_eos=True),
    )


def serve(
    roots: tuple[Path, ...], base: Path, adapters: dict[str, Path], backend: str, mode: str = "none"
) -> LocalEngine:
    engine = local_engine(
        base,
        adapter_dirs=roots,
        mode=mode,
        lora_backend=backend,
        attention_backend=backend,
        kv_page_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=16,
    )
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return engine


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["lora_A", "lora_B", "lora_embedding_A"])
def test_non_finite_factors_are_refused_by_name(
    tmp_path: Path, base: Path, adapters: dict[str, Path], key: str, value: float
) -> None:
    bad = spoiled(adapters["vocabulary"], tmp_path / "bad", key, value)
    engine = local_engine(base, adapter_dirs=(tmp_path,))
    with pytest.raises(InvalidAdapter, match=rf"(?s)adapter_model\.safetensors.*{key}"):
        engine.load_adapter("bad", str(bad))
    assert engine.list_adapters() == ()


@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_an_adapter_that_overflows_by_itself_is_refused(
    tmp_path: Path, base: Path, adapters: dict[str, Path], key: str
) -> None:
    """Finite in the file, infinite in the product."""
    bad = spoiled(adapters["all"], tmp_path / "bad", key, 1e38)
    engine = serve((base.parent, tmp_path), base, adapters, "cpu")
    with pytest.raises(InvalidAdapter, match=r"non-finite at 8 of 8 positions .* too large for float32"):
        engine.load_adapter("bad", str(bad))
    assert [info.name for info in engine.list_adapters()] == sorted(adapters)
    assert engine.generate([request("all", 1)])[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize(("backend", "mode"), CASES)
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_an_overflowing_adapter_fails_alone(
    tmp_path: Path, base: Path, adapters: dict[str, Path], backend: str, mode: str, key: str
) -> None:
    """Finite by itself, infinite with a request's weight; its prefill and its neighbours' decodes share steps."""
    huge = spoiled(adapters["all"], tmp_path / "huge", key, 1e8)
    oracle = Oracle(base, adapters)
    engine = serve((base.parent, tmp_path), base, adapters, backend, mode)
    engine.load_adapter("huge", str(huge))
    good = [request(name, seed) for seed, name in enumerate(NEIGHBOURS * 2)]
    tickets = [engine.submit(r) for r in good[:4]]
    engine.turn()
    heavy = (AdapterRef("huge", 1e32),)
    bad = [engine.submit(replace(request("huge", 100 + i, prompt_tokens=20 * i + 1), adapters=heavy)) for i in range(3)]
    tickets += [engine.submit(r) for r in good[4:]]
    engine.run_until_idle()
    expected = [oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, 10) for r in good]
    assert [engine.generations[t].token_ids for t in tickets] == expected
    for ticket in bad:
        generation = engine.generations[ticket]
        assert generation.num_endings == 1
        assert generation.failure is not None
        assert generation.failure.error == "NonFinite"
        assert "'huge'" in generation.failure.message
    # the poisoned prefix was not kept, and its pages do no harm to whoever gets them next
    again = engine.generate([request(name, 50 + seed, prompt_tokens=30) for seed, name in enumerate(NEIGHBOURS * 2)])
    assert [g.token_ids for g in again] == [
        oracle.greedy(n, prompt(30, seed=50 + s), 10) for s, n in enumerate(NEIGHBOURS * 2)
    ]


@pytest.mark.parametrize(("backend", "mode"), CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_page_harms_its_owner_alone(
    root: Path, base: Path, adapters: dict[str, Path], backend: str, mode: str, value: float
) -> None:
    oracle = Oracle(base, adapters)
    engine = serve((root,), base, adapters, backend, mode)
    good = [request(name, seed, max_tokens=14) for seed, name in enumerate(NEIGHBOURS)]
    tickets = [engine.submit(r) for r in good]
    victim = engine.submit(request(None, 77, prompt_tokens=13, max_tokens=14))
    while not all(engine.generations[t].token_ids for t in [*tickets, victim]):
        engine.turn()
    sequence = next(s for s in engine.core._scheduler.running if s.origin.ticket == victim)
    poison_page(engine, sequence.pages[1], value)
    engine.run_until_idle()
    expected = [oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, 14) for r in good]
    assert [engine.generations[t].token_ids for t in tickets] == expected
    failure = engine.generations[victim].failure
    assert failure is not None
    assert failure.error == "NonFinite"


@pytest.mark.parametrize(("backend", "mode"), CASES)
def test_stale_poison_in_blank_pages_is_cleared(
    root: Path, base: Path, adapters: dict[str, Path], backend: str, mode: str
) -> None:
    oracle = Oracle(base, adapters)
    engine = serve((root,), base, adapters, backend, mode)
    for page in range(1, engine.core.model_info.kv_num_pages):
        poison_page(engine, page, math.nan)
    good = [request(name, seed) for seed, name in enumerate(NEIGHBOURS)]
    got = engine.generate(good)
    assert [g.token_ids for g in got] == [
        oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, 10) for r in good
    ]
    assert all(g.finish is FinishReason.LENGTH for g in got)


def poison_page(engine: LocalEngine, page: int, value: float) -> None:
    """Fill one page of every layer, whatever the backend's layout: write through the op itself, behind what runs."""
    runner = engine.core._steps.executor.runner
    ops, model = runner.ops, runner.model
    spec, size = model.kv_spec(), ops.kv_cache.page_size
    plan = ops.attention.prepare([SequenceSpan(size, size, [page])], ops.kv_cache)

    def write() -> None:
        with torch.inference_mode():
            for layer in range(spec.num_layers):
                kv = torch.full((size, spec.kv_heads, spec.head_dim), value, dtype=model.dtype)
                ops.attention.attend(kv, kv, kv, layer=layer, cache=ops.kv_cache, plan=plan, scale=1.0, window=None)

    if runner.stream is None:
        write()
    else:
        runner.stream.put(write)
