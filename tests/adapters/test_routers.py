"""Routers as files and as formulas: what they choose, what is learnt, and what is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.reading.source import any_directory
from loraplex.adapters.routing.build import Wanted, arrow_router, centroid_router, spherical_means, top_directions
from loraplex.adapters.routing.chooser import Chooser
from loraplex.adapters.routing.files import write_router as write_built
from loraplex.adapters.routing.load import RoutedBase, load_router
from loraplex.adapters.routing.vocabulary import vocabulary_digest
from loraplex.config import ModelConfig
from loraplex.engine.proving import checkpoint_view
from loraplex.errors import AlreadyExists, InvalidAdapter, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from loraplex.models.loader import plan_model
from loraplex.types import Coverage, RouterInfo
from tests.made_adapters import low_rank
from tests.routers import expected, random_prototypes, token_vectors, write_router
from tests.rpc.serving import backend
from tests.tiny import VOCAB_SIZE, load_tiny, prompt, tiny_checkpoint

NAMES = ("a", "b", "c")
Q, K, V = (f"model.layers.0.self_attn.{module}_proj" for module in "qkv")
ROOM = 1 << 20


def quiet(stage: str, done: int, total: int) -> None:
    return None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("routers"), "llama")


@pytest.fixture(scope="module")
def view(base: Path) -> BaseView:
    with checkpoint_view(plan_model(base, ModelConfig(model=str(base), device="cpu", dtype="float32"))) as found:
        weights = {site.name: found.weight(site.name) for site in found.sites if site.kind.value != "linear"}
    return BaseView(found.sites, found.dtype, weights.__getitem__, lambda site: None, False, found.vocab_size)


def load(path: Path, view: BaseView, *, vocabulary: str = "", max_bytes: int = ROOM) -> Chooser:
    facts = load_router(any_directory(str(path)), RoutedBase(view, lambda: vocabulary), max_bytes=max_bytes)
    assert facts.kind == "router"
    assert facts.chooser is not None
    return facts.chooser


class TestChoice:
    @pytest.mark.parametrize("feature", ["centroid", "arrow"])
    def test_is_the_formula(self, base: Path, view: BaseView, tmp_path: Path, feature: str) -> None:
        prototypes = random_prototypes(base, NAMES)
        chooser = load(write_router(tmp_path / "r", base, prototypes, feature=feature), view)
        chosen = set()
        for seed in range(12):
            ids = prompt(1 + seed, seed=seed)
            wanted = expected(base, prototypes, ids, arrow=feature == "arrow")
            assert chooser.probabilities(ids) == pytest.approx(list(wanted.values()), abs=1e-5)
            name, candidates = chooser.choose(ids)
            ranked = sorted(wanted, key=wanted.__getitem__, reverse=True)
            assert [name, *(each.name for each in candidates)] == [ranked[0], *ranked[:2]]
            assert candidates[1].probability == pytest.approx(wanted[ranked[1]], abs=1e-5)
            chosen.add(name)
        assert len(chosen) > 1

    def test_the_best_of_several_prototypes_counts(self, base: Path, view: BaseView, tmp_path: Path) -> None:
        prototypes = {**random_prototypes(base, ("a", "b"), 3), "c": random_prototypes(base, ("c",), 1)["c"]}
        chooser = load(write_router(tmp_path / "r", base, prototypes), view)
        assert chooser.info.num_prototypes == (3, 3, 1)
        for seed in range(6):
            ids = prompt(7, seed=seed)
            assert chooser.probabilities(ids) == pytest.approx(list(expected(base, prototypes, ids).values()), abs=1e-5)

    def test_several_directions_are_a_space(self, base: Path, view: BaseView, tmp_path: Path) -> None:
        """That they are not orthogonal in the file changes nothing."""
        one = random_prototypes(base, ("a",), 2)["a"]
        other = torch.stack((one[0] + one[1], one[0] - 3 * one[1]))
        chooser = load(write_router(tmp_path / "r", base, {"a": one, "b": other}, feature="arrow"), view)
        ids = prompt(5)
        scores = chooser.scores(ids)
        vectors, space = token_vectors(base, ids, arrow=True), np.linalg.qr(one.double().numpy().T)[0]
        assert scores == pytest.approx([np.linalg.norm(vectors @ space, axis=1).mean()] * 2, abs=1e-5)

    def test_below_the_threshold_it_is_the_default(self, base: Path, view: BaseView, tmp_path: Path) -> None:
        prototypes = random_prototypes(base, NAMES)
        ids = prompt(9)
        best = max(expected(base, prototypes, ids).values())
        chosen = {}
        for threshold in (best - 0.01, best + 0.01):
            for default in (None, "other"):
                path = write_router(tmp_path / "r", base, prototypes, threshold=threshold, default=default)
                chosen[threshold > best, default] = load(path, view).choose(ids)[0]
        assert chosen[False, None] == chosen[False, "other"] != ""
        assert (chosen[True, None], chosen[True, "other"]) == ("", "other")

    def test_equals_go_to_the_first_and_rows_without_direction_count_nothing(self) -> None:
        table = np.zeros((3, 2), np.float32)
        info = RouterInfo("centroid", ("z", "a"), (1, 1), 1.0)
        name, candidates = Chooser(info, (1, 1), table).choose((0, 2))
        assert (name, [each.probability for each in candidates]) == ("z", [0.5, 0.5])

    def test_an_embedding_row_that_is_zero_or_not_finite_scores_nothing(
        self, base: Path, view: BaseView, tmp_path: Path
    ) -> None:
        broken = view.weight("model.embed_tokens").clone()
        broken[5], broken[6, 0], broken[7] = 0.0, math.nan, broken[7] * 1e-30
        odd = BaseView(view.sites, view.dtype, lambda site: broken, view.bias, False, view.vocab_size)
        path = write_router(tmp_path / "r", base, random_prototypes(base, NAMES))
        there, here = load(path, view), load(path, odd)
        assert here.scores((5, 6)) == pytest.approx([0.0] * 3)
        assert here.scores((7,)) == pytest.approx(there.scores((7,)).tolist(), abs=1e-5)


class TestLearning:
    def test_centroids_are_means_of_examples(self, base: Path, view: BaseView, tmp_path: Path) -> None:
        prompts = {name: [prompt(4 + i, seed=10 * n + i) for i in range(3)] for n, name in enumerate(NAMES)}
        file = centroid_router(prompts, Wanted(threshold=0.4), RoutedBase(view, lambda: ""), quiet)
        for name, prototype in zip(NAMES, file.prototypes, strict=True):
            mean = np.mean([token_vectors(base, ids).mean(axis=0) for ids in prompts[name]], axis=0)
            assert prototype[0].tolist() == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-5)
        write_built(tmp_path / "built", file)
        chooser = load(tmp_path / "built", view)
        assert chooser.info == file.info
        ids = prompt(8, seed=50)
        assert chooser.scores(ids) == pytest.approx(_chooser(file, RoutedBase(view, lambda: "")).scores(ids), abs=1e-6)
        with pytest.raises(AlreadyExists, match="built exists"):
            write_built(tmp_path / "built", file)

    def test_the_temperature_makes_examples_likeliest(self, view: BaseView) -> None:
        prompts = {name: [prompt(3, seed=10 * n + i) for i in range(4)] for n, name in enumerate(NAMES)}
        routed = RoutedBase(view, lambda: "")
        fitted = centroid_router(prompts, Wanted(), routed, quiet).info.temperature

        def loss(temperature: float) -> float:
            file = centroid_router(prompts, Wanted(temperature=temperature), routed, quiet)
            assert file.info.temperature == temperature
            table = _chooser(file, routed)
            return -sum(
                math.log(table.probabilities(ids)[NAMES.index(name)]) for name, some in prompts.items() for ids in some
            )

        assert loss(fitted) < min(loss(fitted * 2), loss(fitted / 2))

    def test_means_find_what_examples_gather_around(self) -> None:
        centres = torch.eye(5)[:3]
        noise = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * 0.05
        found = spherical_means(centres.repeat(20, 1) + noise, 3)
        assert (found @ centres.T).amax(dim=0).min() > 0.99
        assert torch.equal(found, spherical_means(centres.repeat(20, 1) + noise, 3))
        assert len(spherical_means(centres.repeat(4, 1), 8)) == 3  # no more than are different

    def test_arrow_takes_the_top_right_singular_vectors(self, base: Path, view: BaseView) -> None:
        model = load_tiny(base)
        sites = {Q: low_rank(model, Q, rank=3, scale=2.0), V: low_rank(model, V, rank=2, seed=1)}
        delta = AdapterDelta("u", "lora", sites, Coverage({}, {}))
        dense = torch.cat([sites[Q].low_rank.dense(), sites[V].low_rank.dense()]).double()  # type: ignore[union-attr]
        right = torch.linalg.svd(dense).Vh
        found = top_directions("a", delta, view, 3)
        assert (found.double() @ right[:3].T).abs().diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
        assert len(top_directions("a", delta, view, 64)) == 5  # its rank
        routed = RoutedBase(view, lambda: "")
        file = arrow_router({"a": delta}, {}, Wanted(), routed, quiet)
        assert (file.info.feature, file.info.num_prototypes) == ("arrow", (1,))

    def test_arrow_needs_a_low_rank_change_of_the_first_inputs(self, base: Path, view: BaseView) -> None:
        down = "model.layers.0.mlp.down_proj"
        scaled = SiteDelta(out_scale=torch.ones(8))
        zero = SiteDelta(LowRank(torch.zeros(1, 32), torch.zeros(32, 1), 1.0))
        for sites, problem in (
            ({down: low_rank(load_tiny(base), down)}, f"'a' has no low-rank change of .*{Q}"),
            ({Q: scaled}, "'a' has no low-rank change"),
            ({Q: zero}, "'a' changes nothing of the first"),
        ):
            with pytest.raises(UnsupportedFeature, match=problem):
                top_directions("a", AdapterDelta("u", "lora", sites, Coverage({}, {})), view, 1)

    @pytest.mark.parametrize("arch", ["mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "qwen3"])
    def test_every_family_has_first_inputs(self, tmp_path_factory: pytest.TempPathFactory, arch: str) -> None:
        """That their norm is the one before the first layer is seen in what a linear layer there is given."""
        path = tiny_checkpoint(tmp_path_factory.getbasetemp() / "families", arch)
        with checkpoint_view(plan_model(path, ModelConfig(model=str(path), device="cpu", dtype="float32"))) as view:
            from loraplex.adapters.routing.token_space import TokenSpace, first_layer
            from tests.tiny import oracle

            layer, model = first_layer(view), oracle(path)
            given: list[torch.Tensor] = []
            module = model.get_submodule(layer.inputs[0].name)
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
            ids = torch.tensor([prompt(6)])
            with torch.no_grad():
                model(ids)
            found = TokenSpace(view, "arrow").vectors(ids[0])
            unit = torch.nn.functional.normalize(given[0][0], dim=1)
            assert (found * unit).sum(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-4)


def _chooser(file: object, routed: RoutedBase) -> Chooser:
    from loraplex.adapters.routing.load import chooser_of

    return chooser_of(file, routed, "it", max_bytes=ROOM)  # type: ignore[arg-type]


def _edit(key: str, value: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        values = json.loads((path / "router.json").read_text())
        section = values
        *outer, last = key.split(".")
        for name in outer:
            section = section[name]
        if value is None and last != "default":
            del section[last]
        else:
            section[last] = value
        (path / "router.json").write_text(json.dumps(values))

    return edit


def _tensors(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file(
        {name.replace("_", "."): each.clone() for name, each in tensors.items()}, path / "router.safetensors"
    )


ONE = torch.ones(1, 32)
REFUSED: dict[str, tuple[Callable[[Path], None], type[LoraplexError], str]] = {
    "no JSON": (lambda path: (path / "router.json").write_text("{"), InvalidAdapter, "router.json: not valid JSON"),
    "a key twice": (
        lambda path: (path / "router.json").write_text('{"feature": "a", "feature": "b"}'),
        InvalidAdapter,
        "'feature' appears twice",
    ),
    "unknown key": (_edit("speed", 3), InvalidAdapter, "unknown keys speed"),
    "missing key": (_edit("adapters", None), InvalidAdapter, "lacks adapters"),
    "version": (_edit("loraplex_router", 2), InvalidAdapter, "loraplex_router is 2"),
    "feature": (_edit("feature", "xlora"), InvalidAdapter, "'xlora', expected one of centroid, arrow"),
    "no names": (_edit("adapters", []), InvalidAdapter, "0 names"),
    "name twice": (_edit("adapters", ["a", "b", "a"]), InvalidAdapter, "'a' stands there twice"),
    "name of a router": (_edit("adapters", ["a", "b", "auto:r"]), InvalidAdapter, "'auto:r' asks for a router"),
    "no name": (_edit("adapters", ["a", "b", "../c"]), InvalidAdapter, r"'\.\./c' is no adapter's name"),
    "default": (_edit("default", "auto:r"), InvalidAdapter, "default: 'auto:r' asks for a router"),
    "temperature 0": (_edit("temperature", 0), InvalidAdapter, "temperature is 0, expected a number from 1e-05"),
    "temperature true": (_edit("temperature", True), InvalidAdapter, "temperature is True"),
    "threshold": (_edit("threshold", 1.5), InvalidAdapter, "threshold is 1.5"),
    "hidden size": (_edit("base.hidden_size", 64), InvalidAdapter, r"prototypes.0 of adapter 'a' has shape \[1, 32\]"),
    "vocabulary size": (_edit("base.vocab_size", 7), Mismatch, f"another base: .* is 7, this base's is {VOCAB_SIZE}"),
    "no digest": (_edit("base.vocabulary", "xyz"), InvalidAdapter, "base.vocabulary is 'xyz'"),
    "no tensors": (
        lambda path: (path / "router.safetensors").unlink(),
        InvalidAdapter,
        "router.safetensors is missing",
    ),
    "a prototype too few": (
        _tensors(prototypes_0=ONE, prototypes_1=ONE),
        InvalidAdapter,
        r"lacks prototypes.2 \(of 'c'\)",
    ),
    "a prototype too many": (
        _tensors(prototypes_0=ONE, prototypes_1=ONE, prototypes_2=ONE, prototypes_3=ONE),
        InvalidAdapter,
        "prototypes.3 belong to none of the 3",
    ),
    "NaN": (
        _tensors(prototypes_0=ONE, prototypes_1=ONE * math.nan, prototypes_2=ONE),
        InvalidAdapter,
        "'prototypes.1' holds NaN",
    ),
    "zeros": (
        _tensors(prototypes_0=ONE, prototypes_1=ONE, prototypes_2=ONE * 0),
        InvalidAdapter,
        "adapter 'c' holds a vector of zeros",
    ),
    "an adapter too": (
        lambda path: (path / "adapter_config.json").write_text("{}"),
        InvalidAdapter,
        "holds both router.json and adapter_config.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(base: Path, view: BaseView, tmp_path: Path, case: str) -> None:
    from loraplex.adapters.routing.files import is_router

    spoil, error, problem = REFUSED[case]
    path = write_router(tmp_path / "r", base, random_prototypes(base, NAMES))
    assert is_router(any_directory(str(path)))
    load(path, view)
    spoil(path)

    def look() -> None:
        assert is_router(any_directory(str(path)))
        load(path, view)

    with pytest.raises(error, match=problem):
        look()


def test_another_vocabulary_is_refused_and_too_large_a_table(base: Path, view: BaseView, tmp_path: Path) -> None:
    digest = vocabulary_digest(backend())
    assert (len(digest), vocabulary_digest(None)) == (64, "")
    path = write_router(tmp_path / "r", base, random_prototypes(base, NAMES))
    _edit("base.vocabulary", digest)(path)
    load(path, view, vocabulary=digest)
    load(path, view)  # a base without a tokenizer cannot tell
    with pytest.raises(Mismatch, match=f"another base: its vocabulary is {digest[:12]}"):
        load(path, view, vocabulary="0" * 64)
    with pytest.raises(OverCapacity, match=f"table of {VOCAB_SIZE} tokens and 3 prototypes"):
        load(path, view, max_bytes=VOCAB_SIZE * 12 - 1)


def test_the_uid_is_that_of_the_content(base: Path, view: BaseView, tmp_path: Path) -> None:
    def uid(**changes: object) -> str:
        path = write_router(tmp_path / "r", base, random_prototypes(base, NAMES), **changes)
        return load_router(any_directory(str(path)), RoutedBase(view, lambda: ""), max_bytes=ROOM).uid

    assert uid() == uid() != uid(threshold=0.5)
    before = uid()
    write_router(tmp_path / "r", base, random_prototypes(base, NAMES, 2))
    assert load_router(any_directory(str(tmp_path / "r")), RoutedBase(view, lambda: ""), max_bytes=ROOM).uid != before
