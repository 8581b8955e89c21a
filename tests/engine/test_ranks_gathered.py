"""What lowering asks of the base comes together from all ranks, whatever is cut, and however."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from loraplex.adapters.base_view import view_of
from loraplex.adapters.delta import LowRank
from loraplex.adapters.norms import as_matrix, squared_row_norms
from loraplex.config import ModelConfig
from loraplex.engine.ranks.orders import AskBias, AskSquares, AskWeight, Question, Reply, Tensor
from loraplex.engine.ranks.shares import GatheredBase
from loraplex.engine.ranks.wire import TensorWire
from loraplex.models.base import BaseModel
from loraplex.models.loader import plan_model
from loraplex.models.sites import SiteKind
from loraplex.parallel.runs import take
from loraplex.parallel.shard import Shard
from tests.lonely_rank import load_part
from tests.tiny import tiny_checkpoint

#: on three ranks two groups are nobody's whole, and on four one is on two
CASES = [
    ("mamba2", 4, {"num_heads": 8, "n_groups": 2, "use_bias": True}),
    ("mamba2", 3, {"num_heads": 12, "head_dim": 8, "hidden_size": 48, "n_groups": 2, "vocab_size": 96}),
    ("mamba2", 4, {"num_heads": 12, "head_dim": 8, "hidden_size": 48, "n_groups": 6, "vocab_size": 96}),
    ("granitemoehybrid", 2, {}),
    ("falcon_h1", 2, {}),
]


class Answers:
    """Answers as the other ranks do (``engine/ranks/worker.py``), from models that are all here."""

    def __init__(self, models: list[BaseModel]) -> None:
        self._views = [view_of(model) for model in models]

    def __call__(self, questions: Iterable[tuple[int, Question]]) -> list[Reply]:
        return [self._answer(rank, question) for rank, question in questions]

    def _answer(self, rank: int, question: Question) -> Reply:
        view = self._views[rank]
        match question:
            case AskWeight(site):
                return Tensor(TensorWire.of(view.weight(site)))
            case AskBias(site):
                bias = view.bias(site)
                return Tensor(None if bias is None else TensorWire.of(bias))
            case AskSquares(name, a, b, scale):
                weight = as_matrix(view.weight(name), view.by_name()[name])
                return Tensor(TensorWire.of(squared_row_norms(weight, LowRank(a.tensor(), b.tensor(), scale))))
            case _:
                raise AssertionError(question)


@pytest.mark.parametrize(("family", "size", "overrides"), CASES)
def test_a_base_of_parts_is_the_whole_one(
    tmp_path_factory: pytest.TempPathFactory, family: str, size: int, overrides: dict[str, object]
) -> None:
    checkpoint: Path = tiny_checkpoint(tmp_path_factory.getbasetemp(), family, **overrides)
    plan = plan_model(checkpoint, ModelConfig(device="cpu", dtype="float32"))
    whole = view_of(load_part(plan, 0, 1))
    models = [load_part(plan, rank, size) for rank in range(size)]
    gathered = GatheredBase(models[0], size, Answers(models)).view()
    cut: set[SiteKind] = set()
    for site in whole.sites:
        weight = whole.weight(site.name)
        assert tuple(weight.shape) == site.weight_shape
        assert torch.equal(gathered.weight(site.name), weight), site.name
        bias, found = whole.bias(site.name), gathered.bias(site.name)
        assert (bias is None) is (found is None) is not site.bias
        if bias is not None and found is not None:
            assert torch.equal(found, bias)
        if site.cut.shard is Shard.COLUMN:
            cut.add(site.kind)
            for rank, model in enumerate(models):
                assert torch.equal(model.dense_weight(site.name), take(weight, site.part(rank, size).rows)), site.name
        if site.has_matrix:
            change = LowRank(torch.randn(2, site.in_features), torch.randn(site.out_features, 2), 0.5)
            torch.testing.assert_close(gathered.row_norms(site, change), whole.row_norms(site, change))
    assert cut == {SiteKind.LINEAR, SiteKind.CONV, SiteKind.VECTOR, SiteKind.NORM}
