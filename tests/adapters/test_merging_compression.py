"""Compressed merges are the best approximations, their errors are true, and what they need not form they do not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.merging.merge import merge
from loraplex.types import MergeOptions
from tests.adapters.peft_merges import adapter, dense, dense_sum, of, view


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (6, 40)])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_best_approximation_and_its_error(shape: tuple[int, int], rank: int) -> None:
    base = view(shape)
    inputs = [(adapter(base, seed, rank=3 + seed), 0.6 - 0.5 * seed) for seed in range(3)]
    exact = dense_sum(inputs, "s0")
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    for method in ("cat", "svd"):
        merged = merge(inputs, MergeOptions(method, svd_rank=rank), base)
        got = dense(merged.delta, "s0")
        assert merged.delta.sites["s0"].rank == rank
        torch.testing.assert_close(got, best, rtol=0, atol=1e-5 * float(exact.abs().amax()))
        true = float((got - exact).norm() / exact.norm())
        assert merged.errors["s0"] == pytest.approx(true, rel=1e-4)
        assert true == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_errors_of_dense_methods_are_those_of_their_merge(method: str, shape: tuple[int, int]) -> None:
    base = view(shape)
    inputs = [(adapter(base, seed), 0.8) for seed in range(2)]
    whole, part = (merge(inputs, MergeOptions(method, density=0.5, svd_rank=rank), base) for rank in (24, 3))
    exact, got = dense(whole.delta, "s0"), dense(part.delta, "s0")
    assert whole.errors["s0"] < 1e-6
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(got, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-5 * float(exact.abs().amax()))
    assert part.errors["s0"] == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-4)
    assert part.errors["s0"] > 0.05


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_errors_of_dense_methods_have_the_rounding_in_them(method: str) -> None:
    base, exact_base = (view((40, 24), dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    inputs = [(adapter(base, seed), 0.8) for seed in range(2)]
    same = [(of({name: in_float32(change) for name, change in delta.sites.items()}), 0.8) for delta, _ in inputs]
    exact = dense(merge(same, MergeOptions(method, density=0.5, svd_rank=24), exact_base).delta, "s0")
    for rank in (24, 3):
        merged = merge(inputs, MergeOptions(method, density=0.5, svd_rank=rank), base)
        true = float((dense(merged.delta, "s0") - exact).norm() / exact.norm())
        assert merged.errors["s0"] == pytest.approx(true, rel=1e-2)
        assert true > 1e-4


def in_float32(change: SiteDelta) -> SiteDelta:
    assert change.low_rank is not None
    return SiteDelta(LowRank(change.low_rank.a.float(), change.low_rank.b.float(), change.low_rank.scale))


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.3), (torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_the_least_rank_within_an_error(method: str, dtype: torch.dtype, bound: float) -> None:
    base = view((40, 24), (24, 40), (30, 30), dtype=dtype)
    inputs = [(adapter(base, seed, rank=6), 0.7) for seed in range(3)]
    share = {"density": 0.3} if method == "ties_svd" else {}
    merged = merge(inputs, MergeOptions(method, max_error=bound, **share), base)
    assert merged.errors.keys() == merged.delta.sites.keys()
    for name, change in merged.delta.sites.items():
        assert merged.errors[name] <= bound
        if not share:
            exact = dense_sum(inputs, name)
            assert float((dense(merged.delta, name) - exact).norm() / exact.norm()) <= bound
        alone = [(of({name: delta.sites[name]}), weight) for delta, weight in inputs]
        fewer = merge(alone, MergeOptions(method, svd_rank=change.rank - 1, **share), base)
        assert fewer.errors[name] > bound, "a lower rank does as well"
    assert {change.low_rank.a.dtype for change in merged.delta.sites.values() if change.low_rank} == {dtype}


def test_a_plain_cat_reports_no_errors() -> None:
    base = view((40, 24))
    merged = merge([(adapter(base, 0), 1.0), (adapter(base, 1), 1.0)], MergeOptions("cat"), base)
    assert not merged.errors
    assert merged.delta.max_rank == 8


def test_what_cancels_out_is_not_divided_by() -> None:
    base = view((40, 24), (24, 40))
    one = adapter(base, 0)
    alone = of({"s1": one.sites["s1"]})
    for options in (MergeOptions("svd"), MergeOptions("cat", max_error=0.1), MergeOptions("svd", svd_clamp=0.9)):
        merged = merge([(one, 1.0), (one, -1.0), (alone, 1.0)], options, base)
        assert dense(merged.delta, "s0").abs().amax() < 1e-5
        assert dense(merged.delta, "s1").abs().amax() > 0.1


class Watch(TorchDispatchMode):
    """The most elements that the tensors made under it had together, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self.live or not key:
            return
        self.live[key] = storage.nbytes() // 4
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest = max(self.largest, self.live[key])
        self.peak = max(self.peak, sum(self.live.values()))


@contextmanager
def watched() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("options", [MergeOptions("cat"), MergeOptions("cat", svd_rank=6), MergeOptions("svd")])
def test_exact_sums_never_form_the_dense_matrix(options: MergeOptions) -> None:
    base = view((700, 600))
    inputs = [(adapter(base, seed), 0.5) for seed in range(4)]
    with watched() as watch:
        merge(inputs, options, base)
    assert 0 < watch.largest < 700 * 600 / 10


@pytest.mark.parametrize("method", ["ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_dense_methods_never_form_a_large_dense_matrix(method: str) -> None:
    """What they hold beside blocks is of its shorter side, and a few factors; as much for three sites as for one."""
    few, many = 12_000, 40_000
    peaks = []
    for shapes in ([(200, few)], [(200, many)], [(200, many), (many, 200), (200, many)]):
        base = view(*shapes)
        inputs = [(adapter(base, seed), 0.5) for seed in range(4)]
        with watched() as watch:
            merged = merge(inputs, MergeOptions(method, density=0.5), base)
        assert watch.largest < 200 * many / 10
        peaks.append(watch.peak - sum(delta.nbytes for delta in [merged.delta, *(given for given, _ in inputs)]) // 4)
    assert peaks[1] - peaks[0] < 200 * (many - few) / 10
    assert peaks[2] - peaks[1] < 200 * many / 100
