"""Merges that are exported: PEFT and transformers give the tokens that are served, whatever the base is stored in and
over however many ranks it is cut; and the logits are those of PEFT's own merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraplex.adapters.merging.methods import METHODS, Form
from loraplex.engine.local import LocalEngine
from loraplex.errors import UnsupportedFeature
from loraplex.types import AdapterRef, ExportFormat
from tests.adapters.peft_merges import SEED, Both, logits
from tests.adapters.peft_sites import lora_config
from tests.engines import local_engine
from tests.exported import exporting_engine, load, loaded, merge, merged
from tests.kind_matrix import Case, KindMatrix, clear_case
from tests.oracle import Alone, fresh, with_adapters
from tests.peft_kinds import WIDE_VOCAB
from tests.quant.kinds import kinds_on
from tests.quant.packers import bnb
from tests.ranks import ranked_engine
from tests.tiny import ALL_LINEAR, VOCAB_SIZE, tiny_checkpoint

WEIGHTS = {"a": 0.7, "b": -0.5}
#: of logits, relative to the largest. PEFT truncates by a float32 SVD, which errs where singular values are close
TOLERANCE = {Form.FACTOR_WISE: 1e-4, Form.CAT: 1e-4, Form.SVD: 1e-3}


@contextmanager
def serving(matrix: KindMatrix, out: Path, ranks: int) -> Iterator[LocalEngine]:
    """An engine over one rank or several that exports to ``out``."""
    out.mkdir()
    if ranks == 1:
        yield exporting_engine(matrix, out)
        return
    options = {"adapter_dirs": (matrix.root, out), "export_dirs": (out,)}
    with ranked_engine(matrix.base_dir, ranks, **options) as ranked:  # type: ignore[arg-type]
        yield ranked.engine


def peft_has(matrix: KindMatrix, engine: LocalEngine, name: str, out: Path, base: Callable[[Path], Any]) -> Case:
    """A merge as PEFT loads it on ``base``: its case, which is also what is served, and not what the base answers."""
    engine.export_adapter(name, name)
    oracle = Alone.on(base(matrix.base_dir), out / name)
    case = clear_case(name, oracle, (matrix.short_request("", seed) for seed in range(20)))
    request = msgspec.structs.replace(case.request, adapters=(AdapterRef(name),))
    [served] = engine.generate([request])
    assert served.token_ids == list(case.expected), name
    plain = Alone(base(matrix.base_dir)).greedy(request.prompt_token_ids, len(case.expected))
    assert plain != list(case.expected), f"{name} changes nothing of this answer"
    return case


def transformers_has(engine: LocalEngine, case: Case, out: Path) -> None:
    """The base with the merge in it gives the same."""
    tokens = merged(engine, case.name, out).greedy(case.request.prompt_token_ids, len(case.expected))
    assert tokens == list(case.expected), case.name


@pytest.mark.parametrize("ranks", [1, 2])
def test_merges_on_a_base_of_4_bits(kinds_root: Path, tmp_path: Path, ranks: int) -> None:
    """PEFT has them on bitsandbytes' own nf4, transformers in a dense checkpoint."""
    matrix, out = kinds_on(kinds_root, "nf4"), tmp_path / "out"
    with serving(matrix, out, ranks) as engine:
        load(engine, matrix, "lora", "lora-ranks", "adalora")
        merge(engine, "sum", {"lora": 0.8, "lora-ranks": -0.6, "adalora": 0.5})
        merge(engine, "small", {"lora": 0.8, "lora-ranks": 0.6}, method="svd", svd_rank=3)
        for name in ("sum", "small"):
            transformers_has(engine, peft_has(matrix, engine, name, out, bnb.exact_model), out)


@pytest.mark.parametrize("base", ["llama", "mamba2"])
def test_merges_over_two_ranks_are_those_of_one(kinds_root: Path, tmp_path: Path, base: str) -> None:
    matrix, written = KindMatrix(kinds_root, base, tied=True), []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        with serving(matrix, out, ranks) as engine:
            load(engine, matrix, "lora-ends", "lora-ranks")
            merge(engine, "both", {"lora-ends": 0.7, "lora-ranks": -0.6})
            transformers_has(engine, peft_has(matrix, engine, "both", out, fresh), out)
        written.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert written[0] == written[1]


def test_merges_of_other_kinds_and_of_merges(kinds_root: Path, tmp_path: Path) -> None:
    matrix, out = KindMatrix(kinds_root, "llama", tied=False), tmp_path / "out"
    with serving(matrix, out, 1) as engine:
        load(engine, matrix, "lora", "bdlora", "loha", "vera", "dora", "ia3")
        merge(engine, "inner", {"bdlora": 0.8, "loha": 0.5})
        merge(engine, "outer", {"inner": -0.7, "vera": 0.6, "lora": 0.4}, max_error=0.05)
        for name in ("inner", "outer"):
            transformers_has(engine, peft_has(matrix, engine, name, out, fresh), out)
        merge(engine, "inner-again", {"inner": 2.0})
        engine.load_adapter("from-file", "inner")
        merge(engine, "of-file", {"from-file": 2.0})
        for name in ("inner-again", "of-file"):
            engine.export_adapter(name, name)
        weights = [(out / name / "adapter_model.safetensors").read_bytes() for name in ("inner-again", "of-file")]
        assert weights[0] == weights[1], "a merge and its export are not the same input"
        for name in ("dora", "ia3"):  # what they come to no LoRA can say
            merge(engine, f"only-{name}", {name: 1.0})
            transformers_has(engine, replace(matrix.cases(name)[0], name=f"only-{name}"), out)
            with pytest.raises(UnsupportedFeature, match=r"scales what the base gives at .* it has no PEFT form"):
                engine.export_adapter(f"only-{name}", "refused")
            assert not list(out.glob("refused*"))


def test_merges_that_keep_a_module_have_its_bias(kinds_root: Path, tmp_path: Path) -> None:
    matrix, out = KindMatrix(kinds_root, "llama", tied=True), tmp_path / "out"
    with serving(matrix, out, 1) as engine:
        load(engine, matrix, "lora-saved-linear", "lora-ends", "lora-added-tokens", "lora-tokens")
        merge(engine, "module", {"lora-saved-linear": 1.0})
        transformers_has(engine, peft_has(matrix, engine, "module", out, fresh), out)
        merge(engine, "wide", {"lora-added-tokens": 1.0})
        with pytest.raises(UnsupportedFeature, match=rf"adds tokens \({WIDE_VOCAB}, the base has {VOCAB_SIZE}\)"):
            engine.export_adapter("wide", "refused")
        transformers_has(engine, replace(matrix.cases("lora-added-tokens")[0], name="wide"), out)


def test_merges_that_keep_parameters_are_written_into_the_base_alone(kinds_root: Path, tmp_path: Path) -> None:
    matrix, out = KindMatrix(kinds_root, "mamba2", tied=True), tmp_path / "out"
    with serving(matrix, out, 1) as engine:
        load(engine, matrix, "lora-saved-mixer")
        merge(engine, "mixer", {"lora-saved-mixer": 1.0})
        with pytest.raises(UnsupportedFeature, match=r"its own 'backbone\.layers\.0\.mixer\.\w+', .* parameter"):
            engine.export_adapter("mixer", "refused")
        transformers_has(engine, replace(matrix.cases("lora-saved-mixer")[0], name="mixer"), out)
    assert [path.name for path in out.iterdir()] == ["mixer-merged"]


def test_every_method_is_pefts_own_merge_after_its_way_through_files(tmp_path: Path) -> None:
    """MergeAdapters, ExportAdapter, and what PEFT and transformers load, against ``add_weighted_adapter``."""
    base = tiny_checkpoint(tmp_path, "llama")
    configs = {
        "a": lora_config(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR), alpha_pattern={"k_proj": 3}),
        "b": lora_config(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "up_proj"]),
    }
    both = Both.make(fresh(base), tmp_path / "inputs", configs)
    engine = local_engine(base, adapter_dirs=(tmp_path,), export_dirs=(tmp_path,))
    for name in configs:
        engine.load_adapter(name, f"inputs/{name}")
    for method in METHODS:
        share = {"density": 0.4} if "density" in METHODS[method].options else {}
        merge(engine, method, WEIGHTS, method=method, **share, **({"seed": SEED} if "dare" in method else {}))
        engine.export_adapter(method, method)
        engine.export_adapter(method, f"{method}-merged", ExportFormat.MERGED)
        with both.theirs(WEIGHTS, method, **share) as theirs:
            expected = logits(theirs)
        scale = TOLERANCE[METHODS[method].form] * float(expected.abs().amax())
        for model in (with_adapters(fresh(base), {"m": tmp_path / method}), loaded(tmp_path / f"{method}-merged")):
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=scale, msg=method)
