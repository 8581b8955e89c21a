"""Adapters on state-space and hybrid models, through the tables, against PEFT: a mixed batch, on one rank and more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import peft
import pytest
import torch

from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.cut import cut
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.packed import pack_sites
from loraplex.adapters.reading.source import any_directory
from loraplex.engine.ranks.shares import NoBytes, SlotMark
from loraplex.models.base import BaseModel
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term
from tests.adapters.peft_saved import SavedCase, lora, make, reloaded
from tests.models.family_checks import on_ranks
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt, tiny_checkpoint

TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}
#: what each of a step's sequences is of, beside the base
ADAPTERS: Mapping[str, Callable[[str], SavedCase]] = {
    # PEFT puts nothing around out_proj of most of these; other trainers do
    "every linear": lambda mixer: SavedCase(lora(target_modules="all-linear", r=3)),
    "small parts": lambda mixer: SavedCase(lora(target_modules=["in_proj"], modules_to_save=["conv1d", "norm"])),
    "a mixer": lambda mixer: SavedCase(lora(target_modules=["lm_head"], modules_to_save=[f"layers.0.{mixer}"])),
    "dora": lambda mixer: SavedCase(lora(target_modules=["in_proj", "down_proj"], use_dora=True, bias="all")),
}
VARIANTS: Mapping[str, tuple[str, dict[str, object]]] = {
    "mamba2": ("mamba2", {"use_bias": True}),
    "mamba2-6-groups-of-12-heads": ("mamba2", {"n_groups": 6, "num_heads": 12, "hidden_size": 48}),
    "bamba-1-group": ("bamba", {"mamba_n_groups": 1}),
    "falcon-h1": ("falcon_h1", {}),
    "nemotron-h": ("nemotron_h", {}),
    "granite": ("granitemoehybrid", {}),
}
SLOTS = {name: slot for slot, name in enumerate(ADAPTERS)}
PROMPTS = {name: prompt(9 + 2 * slot, seed=slot) for name, slot in SLOTS.items()}
STEPS = (
    # prefills of all; then decodes; then decodes, and a chunk of the base's
    [*(Chunk(name, ids[:-2], (Term(SLOTS[name]),)) for name, ids in PROMPTS.items()), Chunk("base", prompt(7, seed=8))],
    [Chunk(name, ids[-2:-1], (Term(SLOTS[name]),)) for name, ids in PROMPTS.items()],
    [*(Chunk(name, ids[-1:], (Term(SLOTS[name]),)) for name, ids in PROMPTS.items()), Chunk("late", prompt(4, seed=9))],
)


def adapters(root: Path, checkpoint: Path, family: str, base: BaseView) -> dict[str, AdapterDelta]:
    mixer = "mixer" if family in ("mamba2", "nemotron_h") else "mamba"
    found = {}
    for name, case in ADAPTERS.items():
        path = root / name
        make(case(mixer), checkpoint, path)
        found[name] = load_adapter(any_directory(str(path)), base, max_bytes=1 << 24)
    return found


def fill(deltas: Mapping[str, AdapterDelta], size: int, model: BaseModel, lora_backend: LoraBackend, rank: int) -> None:
    """Put each adapter's share into its slot."""
    sites = {site.name: site for site in model.sites()}
    for name, delta in deltas.items():
        SlotMark(lora_backend.slots).write(SLOTS[name], NoBytes())
        for write in pack_sites(delta.uid, cut(delta.sites, sites, rank, size), model.tables()):
            write.table.write(SLOTS[name], write.packed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_equals_peft_on_one_rank_and_more(
    variant: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    family, overrides = VARIANTS[variant]
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), family, **overrides)
    root = tmp_path_factory.mktemp("adapters")
    backend = ReferenceLora()
    model = load_tiny(checkpoint, lora=backend)
    deltas = adapters(root, checkpoint, family, view_of(model))
    fill(deltas, 1, model, backend, 0)
    runner = PackedRunner(model, lora=backend)
    alone = [runner.step(step) for step in STEPS]
    with torch.inference_mode():
        for index, (name, ids) in enumerate(PROMPTS.items()):
            expected = reloaded(checkpoint, root / name)(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(torch.cat([step[index] for step in alone]), expected, **TOLERANCE)
        base = oracle(checkpoint)(torch.tensor([prompt(7, seed=8)])).logits[0]
        torch.testing.assert_close(alone[0][-1], base, **TOLERANCE)
    for size in (2, 4):
        for found in on_ranks(checkpoint, size, STEPS, partial(fill, deltas, size)):
            for ours, one in zip(found, alone, strict=True):
                torch.testing.assert_close(ours, torch.cat(one), **TOLERANCE)
