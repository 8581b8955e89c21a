"""Tiny models for tests: random checkpoints by transformers, packed batches over a loaded model, PEFT adapters.

``transformers`` and ``peft`` are the oracles; nothing here computes a model's output by itself.
"""

from __future__ import annotations

import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from loraplex.config import ModelConfig
from loraplex.engine.pools import new_cache, new_states
from loraplex.layers.step import StateStep
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex.models.loader import load_model, plan_model
from loraplex_kernels.attention import AttentionBackend, SequenceSpan
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.conv.reference import ReferenceConv
from loraplex_kernels.lora import Factors, LoraBackend, PartDelta, SlotDelta
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.ssd import SsdBackend
from loraplex_kernels.ssd.reference import ReferenceSsd
from loraplex_kernels.states import BLANK, StateSpan, check_spans
from tests.oracle import pretrained

VOCAB_SIZE = 96
LAYERS = 2
#: sequences whose states a PackedRunner has room for
NUM_SLOTS = 16
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mamba2": Mamba2Config,
    "bamba": BambaConfig,
    "falcon_h1": FalconH1Config,
    "nemotron_h": NemotronHConfig,
    "granitemoehybrid": GraniteMoeHybridConfig,
}
DIMENSIONS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HYBRID = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
#: what state-space families need beside these
STATE_DIMENSIONS: dict[str, dict[str, object]] = {
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    "bamba": {**_HYBRID, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {
        **_HYBRID,
        "mamba_d_ssm": 64,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.8],
        "mlp_multipliers": [0.6, 1.2],
        "key_multiplier": 0.8,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.7,
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.5,
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 8,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "time_step_min": 0.2,
        "num_hidden_layers": None,
        "rescale_prenorm_residual": False,
    },
    "granitemoehybrid": {
        **_HYBRID,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
        "embedding_multiplier": 1.5,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
}


def tiny_model(arch: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of one family, in float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[arch](**{**DIMENSIONS, **STATE_DIMENSIONS.get(arch, {}), **overrides})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero, which would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tiny_checkpoint(root: Path, arch: str, *, max_shard_size: str = "5GB", **overrides: object) -> Path:
    """A random checkpoint of one family below ``root``; the same arguments give the same directory, made once, whoever
    else asks for it meanwhile."""
    key = repr((arch, max_shard_size, sorted(overrides.items(), key=lambda item: item[0])))
    path = root / f"{arch}-{zlib.crc32(key.encode()):08x}"
    if not path.is_dir():
        with made_whole(path) as part:
            tiny_model(arch, zlib.crc32(key.encode()), **overrides).save_pretrained(part, max_shard_size=max_shard_size)
    return path


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` for what is to be there when the block is over; what another process made first stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="part-") as folder:
        part = Path(folder, path.name)
        yield part
        try:
            part.rename(path)
        except OSError:
            if not path.exists():
                raise


def oracle(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers, with its plainest attention; nobody else's."""
    model: PreTrainedModel = pretrained(path, dtype, attention="eager")
    return model


def load_tiny(
    path: Path,
    *,
    lora: LoraBackend | None = None,
    attention: AttentionBackend | None = None,
    dtype: str = "float32",
    load_format: str = "auto",
    quantization: str = "",
) -> BaseModel:
    """The checkpoint in Loraplex, on the CPU, with reference backends unless others are given."""
    runtime = Runtime(lora or ReferenceLora(), attention or ReferenceAttention(), adapter_memory=1 << 26)
    config = ModelConfig(model=str(path), device="cpu", dtype=dtype, load_format=load_format, quantization=quantization)
    return load_model(plan_model(path, config), runtime, lambda done, total: None)


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist())


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence, and the adapters it uses."""

    sequence: str
    token_ids: Sequence[int]
    terms: tuple[Term, ...] = ()


class PackedRunner:
    """Runs chunks of many sequences through one packed step after another, over its own pages."""

    def __init__(
        self,
        model: BaseModel,
        *,
        lora: LoraBackend | None = None,
        attention: AttentionBackend | None = None,
        conv: ConvBackend | None = None,
        ssd: SsdBackend | None = None,
        num_pages: int = 256,
        page_size: int = 4,
    ) -> None:
        self.model = model
        self._lora = lora or ReferenceLora()
        self._attention = attention or ReferenceAttention()
        self._cache = new_cache(model, self._attention, num_pages, page_size)
        self._states = new_states(model, NUM_SLOTS)
        self._conv, self._ssd = conv or ReferenceConv(), ssd or ReferenceSsd()
        self._page_size = page_size
        self._slots: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self._free = list(range(1, num_pages))
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Logits of every row of every chunk, ``[n, V]`` each, in the order given."""
        order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].token_ids) > 1, repr(chunks[i].terms)))
        packed = [chunks[i] for i in order]
        spans, states, positions = [], [], []
        for chunk in packed:
            start = self._lengths.get(chunk.sequence, 0)
            states.append(self._state_span(chunk, start))
            spans.append(self._extend(chunk.sequence, start + len(chunk.token_ids), len(chunk.token_ids)))
            positions.extend(range(start, start + len(chunk.token_ids)))
        adapters = self._lora.prepare(plan_rows((len(chunk.token_ids), chunk.terms) for chunk in packed))
        batch = ForwardBatch(
            token_ids=torch.tensor([token for chunk in packed for token in chunk.token_ids]),
            positions=torch.tensor(positions),
            attention=None if self._cache is None else self._attention.prepare(spans, self._cache),
            kv_cache=self._cache,
            adapters=adapters,
            states=self._state_step(states),
        )
        with torch.inference_mode():
            logits = self.model.head(self.model.forward(batch), adapters)
        rows = logits.split([len(chunk.token_ids) for chunk in packed])
        return [rows[order.index(i)] for i in range(len(chunks))]

    def greedy(self, sequence: str, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Prefill, then decode alone."""
        self._prompts[sequence] = len(token_ids)
        out: list[int] = []
        chunk = Chunk(sequence, token_ids)
        for _ in range(num_tokens):
            out.append(int(self.step([chunk])[0][-1].argmax()))
            chunk = Chunk(sequence, out[-1:])
        return out

    def _state_span(self, chunk: Chunk, start: int) -> StateSpan:
        count = len(chunk.token_ids)
        slot = self._slots.setdefault(chunk.sequence, len(self._slots))
        limited = min(count, max(self._prompts.get(chunk.sequence, start + count) - start, 0))
        return StateSpan(count, slot, slot if start else BLANK, num_limited=limited)

    def _state_step(self, spans: Sequence[StateSpan]) -> StateStep | None:
        if self._states is None:
            return None
        check_spans(spans, NUM_SLOTS)
        device = self._states.device
        return StateStep(self._states, self._conv.prepare(spans, device), self._ssd.prepare(spans, device), spans)

    def _extend(self, sequence: str, context_len: int, num_queries: int) -> SequenceSpan:
        pages = self._pages.setdefault(sequence, [])
        while len(pages) * self._page_size < context_len:
            pages.append(self._free.pop())
        self._lengths[sequence] = context_len
        return SequenceSpan(num_queries, context_len, tuple(pages))


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_peft_adapters(model: PreTrainedModel, adapters: Mapping[str, LoraConfig]) -> PeftModel:
    """``model`` with random adapters (``init_lora_weights=False`` in each config, so that B is not zero)."""
    names = list(adapters)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers deprecates, and warns of merging tied targets
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)
        # PEFT writes into the configs it is given
        wrapped = get_peft_model(model, deepcopy(adapters[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, deepcopy(adapters[name]))
    return wrapped.eval()


def peft_factors(model: PeftModel, adapter: str) -> dict[str, Factors]:
    """Site name -> the adapter's factors, scale folded into B."""
    factors: dict[str, Factors] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if adapter in module.lora_embedding_A:
            a, b = module.lora_embedding_A[adapter].detach(), module.lora_embedding_B[adapter].detach()
        else:
            a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        factors[name] = Factors(a, b * module.scaling[adapter])
    return factors


def write_slot(model: BaseModel, slot: int, factors: Mapping[str, Factors]) -> None:
    """Put one adapter's factors into ``slot`` of every table it touches."""
    tables = model.tables()
    unknown = sorted(set(factors) - set(tables))
    assert not unknown, f"factors for {unknown}, which are no sites"
    touched = {id(tables[site].table): tables[site].table for site in factors}
    for table in touched.values():
        parts: list[PartDelta | None] = [None] * len(table.part_sizes)
        for site, pair in factors.items():
            if tables[site].table is table:
                parts[tables[site].part] = PartDelta(pair)
        table.write(slot, table.pack(SlotDelta(tuple(parts))))
