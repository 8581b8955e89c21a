"""Puts an engine together from a configuration: resolves what is ``auto``, loads the model, sizes the pools.

The one place that knows every part's constructor. What was chosen is logged, and reported by ``ModelInfo``.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.exporting.destination import ExportDirs
from loraplex.adapters.exporting.export import BaseFiles, Exporter
from loraplex.adapters.kinds.registry import find_kinds
from loraplex.adapters.merging.recipe import is_recipe
from loraplex.adapters.merging.team import Team
from loraplex.adapters.packed import PackedAdapter
from loraplex.adapters.reader import AdapterReader
from loraplex.adapters.reading.source import AdapterSources
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.routing.files import is_router
from loraplex.adapters.routing.load import RoutedBase, load_router
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.adapters.text.spool import TextSpool
from loraplex.config import Config
from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.batch import Ops
from loraplex.engine.core import CoreParts, EngineCore
from loraplex.engine.defaults import check_devices, with_step_size
from loraplex.engine.desk import AdapterDesk, DeskParts
from loraplex.engine.executor import Executor
from loraplex.engine.exports import Exports
from loraplex.engine.graphs import GraphCapture
from loraplex.engine.loader import AdapterLoader, FoldOrder, LoadJob, stand_aside
from loraplex.engine.merged_forms import Merging
from loraplex.engine.pools import PoolSizes
from loraplex.engine.probe import Prober
from loraplex.engine.rank import LoadedRank, Progress, finish_rank, load_rank
from loraplex.engine.ranks.others import Alone, Others, Packer
from loraplex.engine.runner import Runner
from loraplex.engine.scheduler import AdapterSlots, Scheduler, SchedulerLimits
from loraplex.engine.states import SequenceStates, StatePolicy
from loraplex.engine.trials import PROBE_SLICE_S, Trials
from loraplex.errors import InvalidConfig, Mismatch
from loraplex.models.base import BaseModel
from loraplex.models.generation_config import eos_token_ids
from loraplex.models.loader import held_modules, plan_model
from loraplex.models.registry import describe
from loraplex.quant.formats import NONE
from loraplex.state.pages import PageAllocator
from loraplex.state.slots import StateSlots
from loraplex.types import ModelInfo

log = logging.getLogger("loraplex.engine")

Load = Callable[[LoadJob], PackedAdapter]
"""What the loader's thread does for a job; it may raise anything."""


@dataclass(frozen=True, slots=True)
class Means:
    """How an engine does what a server does one way, and a test or a benchmark may do another."""

    capture: GraphCapture | None = None
    """How decode steps are captured; None is the device's own way, where it has one."""
    make_load: Callable[[Config, BaseModel], Load] | None = None
    """Where adapters come from; None is the sources that the configuration allows."""
    others: Others | None = None
    """The other ranks of a tensor-parallel group; None: there are none."""
    text_spool: Path | None = None
    """Where adapters' own text is kept for front ends; None: nowhere, when there are none."""


def build_core(
    config: Config,
    model_dir: Path,
    model_id: str,
    *,
    progress: Progress,
    wake: Callable[[], None],
    means: Means | None = None,
) -> EngineCore:
    """An engine ready to serve. ``wake`` is called from the loader's thread when a turn is due.

    Raises a LoraplexError (InvalidModel, InvalidConfig, UnsupportedFeature, ...) for what cannot be served.
    """
    means = means or Means()
    _check_dirs(config)
    kinds = find_kinds()
    plan = plan_model(model_dir, config.model)
    config = msgspec.structs.replace(config, engine=with_step_size(config.engine, plan.placement.device))
    _check_limits(config)
    plan.check_ranks(config.model.tensor_parallel_size)
    check_devices(config, plan.placement.device)
    others = means.others or Alone()
    loaded = load_rank(config, plan, others.join(plan.placement.device), progress)
    sizes = others.agree(loaded.sizes)
    runner = finish_rank(loaded, sizes, means.capture, progress)
    others.await_serving()
    model = loaded.model
    eos = eos_token_ids(model_dir)
    served = _Served(model_id, plan.format.name, loaded, sizes, eos)
    info = _model_info(runner, others, served)
    prober = Prober(model, runner.ops, others.tell)
    prober.warm_up()
    bank = AdapterBank(loaded.backends.lora.fence, config.adapters.adapter_memory)
    spool = TextSpool(means.text_spool)
    texts = OwnTexts(BaseText.read(model_dir, eos), allow_templates=config.adapters.allow_templates)
    packer = others.packer(model, loaded.backends.lora.slots, config.adapters.max_adapter_bytes)
    sources, max_bytes = AdapterSources.from_config(config.adapters), config.adapters.max_adapter_bytes
    running = threading.Event()
    # steps of another device leave the loader's cores alone
    team = Team(running.is_set if model.device.type == "cpu" else bool, enter=stand_aside)
    reader = AdapterReader(sources, packer.base, max_bytes, kinds, texts, team)
    make_load = means.make_load or partial(_load_from_sources, reader, spool, packer)
    files = BaseFiles(model_dir, plan.config, describe, partial(held_modules, plan))
    exporter = Exporter(ExportDirs(map(Path, config.adapters.export_dirs)), files, reader)
    loader = AdapterLoader(make_load(config, model), wake, team, exporter.pieces)
    parts = DeskParts(
        AdapterRegistry(bank.residency),
        bank,
        loader,
        # a device works through a whole probe by itself: slices would only make the host wait more often
        Trials(bank, prober.pieces, slice_s=PROBE_SLICE_S if model.device.type == "cpu" else math.inf),
        spool,
        _merging(config, prober, info),
    )
    desk = AdapterDesk(parts, info)
    scheduler = _scheduler(config, model, sizes, desk.slots)
    log.info("serving %s; %s", model_id, ", ".join(f"{what} {name}" for what, name in info.backends.items()))
    return EngineCore(CoreParts(Executor(runner, others), scheduler, desk, Exports(desk, loader), info, running))


def _merging(config: Config, prober: Prober, info: ModelInfo) -> Merging:
    """Adapters are merged by themselves only where that cannot make them slower."""
    caution = ""
    if info.quantization != NONE:
        caution = f"; its matrices are dense, the base's are quantized ({info.quantization})"
    on = config.adapters.auto_merge
    if on and caution:
        log.warning(
            "no adapter is merged by its traffic (--auto-merge) here: one that is merged may be slower%s", caution
        )
    return Merging(prober.agreement, AutoMerge(time.monotonic, on=on and not caution), caution)


def _check_limits(config: Config) -> None:
    """Refuses steps that cannot be, before any weight is read."""
    engine = config.engine
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise InvalidConfig(
            f"max_num_batched_tokens {engine.max_num_batched_tokens} is less than max_num_seqs {engine.max_num_seqs}: "
            f"not every running sequence could decode in a step",
            field="max_num_batched_tokens",
        )


def _scheduler(config: Config, model: BaseModel, sizes: PoolSizes, adapters: AdapterSlots) -> Scheduler:
    """Over the pages and slots that there are."""
    engine = config.engine
    slots = StateSlots(sizes.num_slots) if sizes.num_slots else None
    max_num_seqs = sizes.max_num_seqs(engine.max_num_seqs)
    if max_num_seqs < engine.max_num_seqs:
        log.info(
            "%d sequences run at once, not %d: there are states for no more (--kv-cache-memory)",
            max_num_seqs,
            engine.max_num_seqs,
        )
    pages = PageAllocator(
        sizes.num_pages,
        engine.kv_page_size,
        prefix_cache=engine.prefix_cache,
        on_forget=slots.forget if slots else lambda page: None,
    )
    policy = StatePolicy(saves=engine.prefix_cache, limits_prompt_steps=model.limits_prompt_steps)
    states = SequenceStates(slots, pages, policy) if slots else None
    limits = SchedulerLimits(max_num_seqs, engine.max_num_batched_tokens, engine.max_waiting)
    return Scheduler(limits, pages, adapters, states)


def _check_dirs(config: Config) -> None:
    adapters = config.adapters
    for key, flag, paths in (
        ("adapter_dirs", "--adapter-dir", adapters.adapter_dirs),
        ("export_dirs", "--export-dir", adapters.export_dirs),
    ):
        for path in paths:
            if not Path(path).is_dir():
                raise InvalidConfig(f"{key}: {path!r} is not a directory ({flag})", field=key)


@dataclass(frozen=True, slots=True)
class _Served:
    """What is known of the served model beside its runner."""

    model_id: str
    quantization: str
    rank: LoadedRank
    sizes: PoolSizes
    eos: tuple[int, ...]

    def backends(self, ops: Ops) -> dict[str, str]:
        """Of the ops that the model has."""
        names = {"lora": ops.lora.name}
        if ops.kv_cache is not None:
            names["attention"] = ops.attention.name
        if ops.states is not None:
            names.update(conv=ops.states.conv.name, ssd=ops.states.ssd.name)
        if self.quantization != NONE:
            names["quant"] = self.rank.backends.quant.name
        return names


def _model_info(runner: Runner, others: Others, served: _Served) -> ModelInfo:
    model, config, sizes = runner.model, served.rank.config, served.sizes
    states = model.state_shape()
    return ModelInfo(
        model_id=served.model_id,
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        quantization=served.quantization,
        tensor_parallel_size=config.model.tensor_parallel_size,
        vocab_size=model.vocab_size,
        max_model_len=served.rank.max_model_len(sizes.num_pages),
        eos_token_ids=served.eos,
        sites=tuple(dict.fromkeys(site.module for site in model.sites())),
        backends={**served.backends(runner.ops), "graphs": "on" if runner.has_graphs else "off"},
        max_num_seqs=sizes.max_num_seqs(config.engine.max_num_seqs),
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        kv_page_size=config.engine.kv_page_size,
        kv_num_pages=sizes.num_pages,
        state_num_slots=sizes.num_slots,
        state_slot_bytes=0 if states is None else states.slot_bytes(model.dtype),
        adapter_memory_bytes=config.adapters.adapter_memory,
        weight_bytes=model.weight_bytes + others.weight_bytes,
    )


def _load_from_sources(
    reader: AdapterReader, spool: TextSpool, pack: Packer, _config: Config, _model: BaseModel
) -> Load:
    routed = RoutedBase(reader.base, reader.texts.vocabulary)

    def load(job: LoadJob) -> PackedAdapter:
        is_directory = job.fold is None and not is_recipe(job.source)
        if is_directory and is_router(directory := reader.sources.resolve(job.source)):
            return PackedAdapter(load_router(directory, routed, max_bytes=reader.max_bytes), ())
        found, merge = reader.read(job.source, job.give_way)
        if job.fold is not None:
            return _folded(found, job, job.fold, pack)
        packed = pack(found, job.give_way)
        try:
            facts = replace(packed.facts, merge=merge)
            return replace(packed, facts=facts, text_file=spool.write(found.text))
        except BaseException:
            packed.discard()
            raise

    return load


def _folded(found: AdapterDelta, job: LoadJob, order: FoldOrder, pack: Packer) -> PackedAdapter:
    """Raises Mismatch: the source is not what it was when the adapter was loaded."""
    if found.uid != order.uid:
        raise Mismatch(
            f"adapter {job.name!r}: its source {job.source!r} has changed since it was loaded (uid {order.uid}, now "
            f"{found.uid}): load it again (on_conflict=REPLACE, or --replace) to have it merged",
            field="resident_mode",
        )
    return pack.fold(found, order.room_bytes, job.give_way)
