"""A base model with all that an adapter is held against, and no engine: what ``loraplex lint`` runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.packed import pack_adapter
from loraplex.config import AdaptersConfig, EngineConfig
from loraplex.engine.batch import Ops, StateOps
from loraplex.engine.pools import LEAST_PAGES, new_cache, new_states
from loraplex.engine.probe import Prober
from loraplex.errors import OverCapacity
from loraplex.models.assemble import Runtime
from loraplex.models.loader import ModelPlan, Progress, load_model
from loraplex.models.renamed import renamed
from loraplex.quant.base import Slab
from loraplex.quant.loading import Storage
from loraplex_kernels.backend import AUTO, choose_attention, choose_conv, choose_lora, choose_quant, choose_ssd
from loraplex_kernels.quant.reference import ReferenceQuant


@contextmanager
def checkpoint_view(plan: ModelPlan) -> Iterator[BaseView]:
    """What lowering sees of a checkpoint whose model is not loaded: tensors are read when they are asked for."""
    spec, dtype = plan.spec, plan.placement.dtype
    biased = {site.name for site in spec.sites() if site.bias}
    with plan.source.open(plan.path, spec, plan.placement) as found:
        reader = renamed(found, spec.names.aliases)
        storage = Storage(reader, plan.format, plan.placement, ReferenceQuant())
        matrices = spec.matrices()

        def weight(site: str) -> torch.Tensor:
            # a tied head has no tensor of its own
            matrix = matrices.get(spec.names.embed if spec.tied and site == spec.names.head else site)
            if matrix is None:
                return reader.tensor(f"{site}.weight").to(dtype)
            slab = Slab(matrix, slice(0, matrix.out_features), slice(0, matrix.in_features))
            return storage.weight((slab,)).dequantize()

        yield BaseView(
            sites=spec.sites(),
            dtype=dtype,
            weight=weight,
            bias=lambda site: reader.tensor(f"{site}.bias").to(dtype) if site in biased else None,
            tied=spec.tied,
            vocab_size=spec.vocab_size,
            aliases=spec.names.aliases,
        )


class ProvingGround:
    """Loads the model when it is made; then lays adapters out and tries them, one after the other."""

    def __init__(self, plan: ModelPlan, progress: Progress) -> None:
        """Raises InvalidModel as ``load_model`` does."""
        device, dtype, page_size = plan.placement.device, plan.placement.dtype, EngineConfig().kv_page_size
        lora = choose_lora(AUTO, device)
        attention = choose_attention(AUTO, device, dtype=dtype, page_size=page_size)
        conv, ssd = choose_conv(AUTO, device), choose_ssd(AUTO, device)
        runtime = Runtime(
            lora,
            attention,
            AdaptersConfig().max_adapter_bytes,
            quant=choose_quant(AUTO, device),
            conv=conv,
            ssd=ssd,
        )
        model = load_model(plan, runtime, progress)
        cache = new_cache(model, attention, LEAST_PAGES, page_size)
        pool = new_states(model, 1)
        states = None if pool is None else StateOps(conv, ssd, pool)
        self.base: BaseView = view_of(model)
        self._tables = model.tables()
        self._prober = Prober(model, Ops(lora, attention, cache, device, states))

    def prove(self, delta: AdapterDelta) -> AdapterFacts:
        """The facts of a lowered adapter, its probe among them; nothing of it is kept.

        Raises:
            InvalidAdapter, UnsupportedFeature: as packing and the probe do.
            OverCapacity: it takes more memory than there is.
        """
        adapter = pack_adapter(delta, self._tables, self.base, max_bytes=AdaptersConfig().max_adapter_bytes)
        try:
            return replace(adapter.facts, probe=self._prober.try_out(adapter))
        except MemoryError as error:
            raise OverCapacity(f"adapter {delta.uid}: out of memory while it was tried out: {error}") from error
