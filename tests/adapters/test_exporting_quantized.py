"""Merged exports whose matrices are quantized: codes that the form's own library makes of the dense export, weights and
tokens that transformers and this server then have of them, which modules they are, and what is said to be lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.exporting import requantized
from loraplex.engine.local import LocalEngine
from loraplex.errors import InvalidRequest
from loraplex.quant.written import WRITE_FORMATS
from loraplex.types import EXPORT_QUANTIZATIONS, ExportFormat, ExportProgress, Request, StopRule
from loraplex_kernels.quant.stored import decode
from tests.engines import local_engine
from tests.exported import loaded
from tests.oracle import Alone, make_adapter
from tests.quant.kinds import SIZES, STATE_SIZES
from tests.quant.packers import bnb as packers
from tests.quant.packers import library
from tests.ranks import ranked_engine
from tests.tiny import load_tiny, prompt, tiny_checkpoint

#: of this all linear modules of a layer have rows and columns that are multiples of 128
BASE: Mapping[str, object] = {**SIZES, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}
CHANGED = tuple(
    f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")
)
#: whose change is zero
IDLE = CHANGED[0]
PROMPTS = tuple(prompt(12, seed=seed) for seed in range(3))
ANSWER = StopRule(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized-exports")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return tiny_checkpoint(root, "llama", **BASE)


@pytest.fixture(scope="module")
def adapter(root: Path, base: Path) -> Path:
    """A LoRA of ``CHANGED``, one of which it leaves as it is."""
    path = make_adapter(base, root / "adapter", seed=1, r=4, target_modules=["q_proj", "down_proj"])
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{IDLE}.lora_B.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    return path


def engine_of(base: Path, adapter: Path, out: Path, **options: object) -> LocalEngine:
    """One with the adapter, that may export to ``out``."""
    out.mkdir(exist_ok=True)
    engine = local_engine(base, adapter_dirs=(adapter.parent,), export_dirs=(out,), **options)  # type: ignore[arg-type]
    engine.load_adapter("lora", str(adapter))
    return engine


def export(engine: LocalEngine, form: str, *, max_shard_bytes: int = 0) -> ExportProgress:
    """Write it merged under the form's name, or as ``dense``; what is said at the end."""
    engine.export_adapter("lora", form, ExportFormat.MERGED, max_shard_bytes, "" if form == "dense" else form)
    return engine.exporting[-1]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exports(request: pytest.FixtureRequest, root: Path, base: Path, adapter: Path) -> Path:
    """Every form of the base with the adapter in it, and the dense one, as a base of that dtype has them."""
    out = root / f"exports-{request.param}"
    engine = engine_of(base, adapter, out, dtype=request.param)
    for form in ("dense", *EXPORT_QUANTIZATIONS):
        last = export(engine, form, max_shard_bytes=60_000 if form == "int8" else 0)
        (out / form / "said.json").write_text(
            json.dumps([last.largest_error_site, last.largest_error, last.mean_error])
        )
    return out


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def section_of(path: Path) -> dict[str, object]:
    section: dict[str, object] = json.loads((path / "config.json").read_text())["quantization_config"]
    return section


def served(path: Path) -> list[list[int]]:
    """Greedy tokens of a checkpoint as this server has it."""
    requests = [Request(f"r{index}", ids, stop=ANSWER) for index, ids in enumerate(PROMPTS)]
    generations = local_engine(path).generate(requests)
    assert all(generation.failure is None for generation in generations)
    return [generation.token_ids for generation in generations]


def alone(model: torch.nn.Module) -> list[list[int]]:
    return [Alone(model).greedy(ids, 5) for ids in PROMPTS]


@pytest.mark.parametrize("form", EXPORT_QUANTIZATIONS)
def test_the_files_are_those_that_the_library_makes_of_the_dense_export(exports: Path, form: str) -> None:
    dense, found = tensors_of(exports / "dense"), tensors_of(exports / form)
    assert "lm_head.weight" not in dense  # tied
    expected: dict[str, torch.Tensor] = {}
    for key, tensor in dense.items():
        name, _, end = key.rpartition(".")
        expected |= library.stored(form, name, tensor) if name.endswith("_proj") and end == "weight" else {key: tensor}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)), key
    assert (len(list((exports / form).glob("*.safetensors"))) > 1) is (form == "int8")  # as its shards were to be small


@pytest.mark.parametrize("form", EXPORT_QUANTIZATIONS)
def test_what_is_lost_is_said(exports: Path, form: str) -> None:
    dense, made = tensors_of(exports / "dense"), load_tiny(exports / form)
    errors = {}
    for key in (key for key in dense if key.endswith("_proj.weight")):
        name, exact = key.removesuffix(".weight"), dense[key].double()
        errors[name] = float((made.dense_weight(name).double() - exact).norm() / exact.norm())
    site, largest, mean = json.loads((exports / form / "said.json").read_text())
    assert site == max(errors, key=errors.__getitem__)
    assert largest == pytest.approx(errors[site], rel=1e-5)
    assert mean == pytest.approx(sum(errors.values()) / len(errors), rel=1e-5)
    assert 1e-3 < mean < largest < 0.2
    assert json.loads((exports / "dense" / "said.json").read_text()) == ["", 0, 0]


@pytest.mark.parametrize("form", EXPORT_QUANTIZATIONS)
def test_transformers_has_the_same_weights(exports: Path, form: str) -> None:
    theirs, ours = loaded(exports / form), load_tiny(exports / form)
    weights = library.dense_weights(theirs)
    assert {name for name in weights if name.endswith("_proj")} == {
        site.name for site in ours.sites() if site.name.endswith("_proj")
    }
    for name, weight in weights.items():
        assert torch.equal(ours.dense_weight(name), weight), name


@pytest.mark.parametrize("exports", ["float32"], indirect=True)
@pytest.mark.parametrize("form", EXPORT_QUANTIZATIONS)
def test_transformers_has_the_same_tokens(exports: Path, form: str) -> None:
    """Their int8 products round inputs too (LLM.int8()), so those are made of what they dequantize; and they have fp8
    dense where there is no GPU."""
    theirs = packers.exact(loaded(exports / form))
    assert alone(theirs.dequantize() if form == "int8" else theirs) == served(exports / form)


@pytest.fixture(scope="module")
def nf4_base(root: Path, base: Path) -> Path:
    """The base in nf4, but for two modules."""
    path = root / "nf4-base"
    packers.skipping(base, path, 4, ["lm_head", "k_proj", "model.layers.1.mlp.up_proj"], kind="nf4")
    return path


def test_an_nf4_base_keeps_its_codes_and_what_it_has_dense(root: Path, nf4_base: Path, adapter: Path) -> None:
    out = root / "from-nf4"
    engine = engine_of(nf4_base, adapter, out)
    last = export(engine, "nf4")
    before, after = tensors_of(nf4_base), tensors_of(out / "nf4")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    kept = {name for name in CHANGED if name != IDLE}
    assert {key.partition(".weight")[0] for key in changed} == kept
    assert {f"{name}.weight" for name in kept} < changed
    skipped = {"lm_head", "model.layers.1.mlp.up_proj", *(f"model.layers.{n}.self_attn.k_proj" for n in (0, 1))}
    assert set(section_of(out / "nf4")["llm_int8_skip_modules"]) == skipped  # type: ignore[call-overload]
    assert last.largest_error_site in kept
    # three of eleven: the others are what they were
    assert last.largest_error / 11 < last.mean_error <= last.largest_error * 3 / 11
    assert alone(packers.exact(loaded(out / "nf4"))) == served(out / "nf4")
    # in another form nothing is the base's own
    export(engine, "int8")
    assert section_of(out / "int8")["llm_int8_skip_modules"] == ["lm_head"]
    assert sum(key.endswith(".SCB") for key in tensors_of(out / "int8")) == 14


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_a_base_that_is_quantized_at_load_keeps_its_weights(root: Path, base: Path, adapter: Path, form: str) -> None:
    out = root / f"from-{form}-at-load"
    export(engine_of(base, adapter, out, quantization=form), form)
    before, after = load_tiny(base, quantization=form), load_tiny(out / form)
    for name in (IDLE, "model.layers.1.mlp.up_proj"):
        torch.testing.assert_close(before.dense_weight(name), after.dense_weight(name), rtol=1e-6, atol=0)
        if form != "fp4":  # which has two codes for zero, and bitsandbytes uses both
            key = f"{name}.weight"
            assert torch.equal(tensors_of(out / form)[key], library.stored(form, name, tensors_of(base)[key])[key])
    assert not torch.equal(before.dense_weight(CHANGED[1]), after.dense_weight(CHANGED[1]))


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_a_base_of_two_ranks_is_quantized_whole(
    root: Path, base: Path, nf4_base: Path, adapter: Path, form: str
) -> None:
    served_base = nf4_base if form == "nf4" else base
    outs = [root / f"{form}-on-{size}" for size in (1, 2)]
    said = [export(engine_of(served_base, adapter, outs[0]), form)]
    outs[1].mkdir()
    options = {"adapter_dirs": (adapter.parent,), "export_dirs": (outs[1],)}
    with ranked_engine(served_base, 2, **options) as ranked:  # type: ignore[arg-type]
        ranked.engine.load_adapter("lora", str(adapter))
        said.append(export(ranked.engine, form))
    files = [(out / form / "model.safetensors").read_bytes() for out in outs]
    assert files[0] == files[1]
    assert said[0].largest_error == said[1].largest_error > 0


@pytest.mark.parametrize("form", EXPORT_QUANTIZATIONS)
def test_errors_are_those_of_the_whole_matrix_however_it_is_cut(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(384, 128, generator=torch.Generator().manual_seed(5))
    stored = WRITE_FORMATS[form]().quantizer.quantized("m.weight", weight)
    whole = requantized.relative_error(stored, weight)
    exact = weight.double()
    assert whole == pytest.approx(float((decode(stored, torch.float64) - exact).norm() / exact.norm()), rel=1e-6)
    monkeypatch.setattr(requantized, "_CHUNK_ELEMENTS", 200 * 128)
    assert requantized.relative_error(stored, weight) == pytest.approx(whole, rel=1e-12)
    assert requantized.relative_error(WRITE_FORMATS[form]().quantizer.quantized("m", weight * 0), weight * 0) == 0


@pytest.mark.parametrize(("arch", "form"), [("mamba2", "nf4"), ("bamba", "fp4"), ("nemotron_h", "int8")])
def test_state_space_families_load_in_transformers(root: Path, arch: str, form: str) -> None:
    base = tiny_checkpoint(root, arch, **STATE_SIZES.get(arch, {}))
    out = root / f"{arch}-exports"
    path = make_adapter(base, root / f"{arch}-adapter", seed=2, r=4, target_modules=["in_proj"])
    export(engine_of(base, path, out), form)
    theirs, ours = loaded(out / form), load_tiny(out / form)
    weights = library.dense_weights(theirs)
    assert any(name.endswith("in_proj") for name in weights)
    assert all(torch.equal(ours.dense_weight(name), weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("nf4", r"q_proj: 32 inputs are no multiple of the 64 of a block of nf4; leave it out to export dense"),
        ("fp4", r"q_proj: 32 inputs are no multiple of the 64 of a block of fp4"),
        ("fp8", r"q_proj: 32 inputs are no multiple of the 128 of a block of fp8"),
    ],
)
def test_sizes_that_a_form_has_no_blocks_for_are_refused(root: Path, tmp_path: Path, form: str, part: str) -> None:
    base = tiny_checkpoint(root, "llama")
    path = make_adapter(base, tmp_path / "adapter", seed=1, r=2, target_modules=["q_proj"])
    engine = engine_of(base, path, tmp_path / "out")
    with pytest.raises(InvalidRequest, match=part) as caught:
        export(engine, form)
    assert caught.value.field == "quantization"
    assert not list((tmp_path / "out").iterdir())
    export(engine, "int8")


def test_rows_that_blocks_of_128_do_not_divide_are_refused(root: Path, adapter: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(root, "llama", **{**BASE, "num_key_value_heads": 2})
    with pytest.raises(InvalidRequest, match=r"k_proj: 64 outputs are no multiple of the 128 of a block of fp8"):
        export(engine_of(base, adapter, tmp_path / "out"), "fp8")
    assert not list((tmp_path / "out").iterdir())


def test_what_may_be_asked_for_is_what_there_is() -> None:
    assert tuple(WRITE_FORMATS) == EXPORT_QUANTIZATIONS
