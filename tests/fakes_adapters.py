"""Small real stand-ins for adapter tests: a table that remembers, adapter directories, tiny base models."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.packed import PackedAdapter, Write, pack_adapter
from loraplex.models.base import TableRef
from loraplex.models.sites import Site, SiteKind
from loraplex.types import Coverage
from loraplex_kernels.lora import Factors, Fence, PartDelta, SlotDelta, StepPlan
from loraplex_kernels.lora.factors import fit_delta, tensors_of
from loraplex_kernels.lora.fence import AlwaysDone
from tests.fakes_rows import linear_rows

SITE_BYTES = 2 * 8 * 4  # rank 1, hidden 8, float32
#: parameters of a state-space layer that stand in it by themselves
VECTORS = ("A_log", "D", "dt_bias")
ONE_SITE = ("model.layers.0.q_proj",)


@dataclass(frozen=True)
class PackedOnes:
    """A delta, and its true bytes."""

    delta: SlotDelta

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.delta))


class RememberingTable:
    """A LoraTable that only keeps what was written, and can be told to refuse."""

    def __init__(self, in_features: int, part_sizes: tuple[int, ...]) -> None:
        self.in_features = in_features
        self.part_sizes = part_sizes
        self.rows: dict[int, SlotDelta] = {}
        self.refusal: Exception | None = None

    def pack(self, delta: SlotDelta) -> PackedOnes:
        fitted = fit_delta(delta, in_features=self.in_features, part_sizes=self.part_sizes, dtype=torch.float32)
        return PackedOnes(fitted)

    def write(self, slot: int, packed: PackedOnes) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.rows[slot] = packed.delta

    def clear(self, slot: int) -> None:
        self.rows.pop(slot, None)

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        raise AssertionError("the bank computes nothing")

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        raise AssertionError("the bank computes nothing")

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        raise AssertionError("the bank computes nothing")


class SlowFence:
    """Done when it is told to be."""

    def __init__(self, passed: bool) -> None:
        self.passed = passed

    def done(self) -> bool:
        return self.passed


class SlowFences:
    """Makes fences that are not done until ``pass_some``, in the order they were made; at once while not ``slow``."""

    def __init__(self) -> None:
        self.slow = True
        self._made: list[SlowFence] = []

    def __call__(self) -> SlowFence:
        self._made.append(SlowFence(not self.slow))
        return self._made[-1]

    @property
    def num_pending(self) -> int:
        return sum(not fence.passed for fence in self._made)

    def pass_some(self, count: int) -> None:
        """The next ``count`` fences are done."""
        for fence in [fence for fence in self._made if not fence.passed][:count]:
            fence.passed = True


class StepClock:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def fake_tables(layers: int, hidden: int = 8) -> tuple[list[RememberingTable], dict[str, TableRef]]:
    """Per layer one packed q/k/v table and one o table, with their sites."""
    tables: list[RememberingTable] = []
    refs: dict[str, TableRef] = {}
    for layer in range(layers):
        packed, single = RememberingTable(hidden, (hidden, hidden, hidden)), RememberingTable(hidden, (hidden,))
        tables += [packed, single]
        for part, module in enumerate(("q_proj", "k_proj", "v_proj")):
            refs[f"model.layers.{layer}.{module}"] = TableRef(packed, part, linear_rows(hidden, hidden))
        refs[f"model.layers.{layer}.o_proj"] = TableRef(single, 0, linear_rows(hidden, hidden))
    return tables, refs


def fake_delta(uid: str, sites: Iterable[str], rank: int = 1, hidden: int = 8, scale: float = 2.0) -> AdapterDelta:
    """A delta of ones; ``2 * rank * hidden * 4`` bytes a site."""
    deltas = {site: SiteDelta(LowRank(torch.ones(rank, hidden), torch.ones(hidden, rank), scale)) for site in sites}
    return AdapterDelta(uid, "lora", deltas, Coverage({}, {}))


class BankRoom:
    """A bank over fresh tables."""

    LAYERS: Final = 3

    def __init__(self, budget_sites: int = 1 << 14, fence: Callable[[], Fence] = AlwaysDone) -> None:
        self.tables, self.refs = fake_tables(self.LAYERS)
        #: what several adapters may share is written here, by content
        self.shared_tables: dict[str, RememberingTable] = {}
        self.bank = AdapterBank(fence, budget_sites * SITE_BYTES, StepClock())

    def add(self, uid: str, sites: Iterable[str] = ONE_SITE, rank: int = 1, scale: float = 2.0) -> None:
        self.bank.add(pack_adapter(fake_delta(uid, sites, rank, scale=scale), self.refs))

    def add_sharing(self, uid: str, sites: Sequence[str], shared: Mapping[str, int]) -> None:
        """An adapter with ``sites`` of its own, and content that others may have: key -> size in sites."""
        own = pack_adapter(fake_delta(uid, sites or ONE_SITE), self.refs)
        writes = [Write(*self._shared_piece(key, size), key) for key, size in shared.items()]
        self.bank.add(PackedAdapter(own.facts, (*(own.writes if sites else ()), *writes)))

    def _shared_piece(self, key: str, size: int) -> tuple[RememberingTable, PackedOnes]:
        table = self.shared_tables.setdefault(key, RememberingTable(8, (8,)))
        return table, table.pack(SlotDelta((PartDelta(Factors(torch.ones(size, 8), torch.ones(8, size))),)))

    def num_written(self) -> int:
        """Slots filled, over all tables."""
        return sum(len(table.rows) for table in self.tables)


def run_until_usable(bank: AdapterBank, *uids: str) -> tuple[int, ...]:
    """The slots of these adapters, once all are on the device together."""
    for _ in range(100):
        slots = bank.ensure(uids)
        if slots is not None:
            return slots
        bank.advance(0.0)
    raise AssertionError(f"{uids} never became usable")


def tiny_llama(*, tied: bool = False, vocab_size: int = 48) -> LlamaForCausalLM:
    """Two layers of random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def sites_of(model: torch.nn.Module) -> tuple[Site, ...]:
    """Every linear, embedding, norm and convolution module of a transformers model, and its vectors by heads."""
    sites: list[Site] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bias = module.bias is not None
            sites.append(Site(name, SiteKind.LINEAR, module.in_features, module.out_features, bias))
        if isinstance(module, torch.nn.Embedding):
            sites.append(Site(name, SiteKind.EMBEDDING, module.num_embeddings, module.embedding_dim))
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated")):
            sites.append(Site(name, SiteKind.NORM, len(module.weight), len(module.weight)))
        if isinstance(module, torch.nn.Conv1d):
            bias = module.bias is not None
            sites.append(Site(name, SiteKind.CONV, module.kernel_size[0], module.out_channels, bias))
        for vector in VECTORS:
            if (parameter := dict(module.named_parameters(recurse=False)).get(vector)) is not None:
                sites.append(Site(f"{name}.{vector}", SiteKind.VECTOR, len(parameter), len(parameter)))
    return tuple(sites)


def view_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> BaseView:
    """What a loader sees of a transformers model."""

    sites = sites_of(model)
    keys = {site.name: site.weight_key for site in sites}

    def bias(name: str) -> torch.Tensor | None:
        found = dict(model.named_parameters()).get(f"{name}.bias")
        return None if found is None else found.detach()

    return BaseView(
        sites=sites,
        dtype=dtype,
        weight=lambda name: model.get_parameter(keys[name]).detach(),
        bias=bias,
        tied=bool(model.config.tie_word_embeddings),
        vocab_size=int(model.config.vocab_size),
    )


def save_peft(model: torch.nn.Module, path: Path, **config: Any) -> peft.PeftModel:
    """Save a PEFT adapter with random A and B; returns the PEFT model for comparison."""
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        adapted.save_pretrained(path)
    return adapted


def load_peft(model: torch.nn.Module, path: Path) -> peft.PeftModel:
    """What PEFT makes of a saved adapter: the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, path)


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A well-formed file of these tensors."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes = b"") -> bytes:
    """Header length, header, data."""
    return struct.pack("<Q", len(header)) + header + data


def write_adapter(path: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor] | bytes) -> Path:
    """An adapter directory with this config and these tensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    raw = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
    (path / "adapter_model.safetensors").write_bytes(raw)
    return path
