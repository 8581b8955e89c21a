"""``loraplex serve``: builds the configuration, starts the engine and the gRPC server, and ends them in order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from loraplex import __version__
from loraplex.commands.base_model import BaseModelDir, find_base_model
from loraplex.commands.node import take_part
from loraplex.commands.progress import StageProgress
from loraplex.commands.settings import add_flags, build_config
from loraplex.commands.tables import mebibytes
from loraplex.config import Config
from loraplex.engine.client import EngineClient, start_engine
from loraplex.engine.handle import EngineHandle
from loraplex.engine.messages import Loading
from loraplex.engine.supervisor import SupervisedEngine
from loraplex.errors import InvalidConfig
from loraplex.logs import set_up_logging
from loraplex.metrics import Metrics, MetricsServer
from loraplex.parallel.network import check_nodes
from loraplex.rpc.app import App
from loraplex.text.tokenizer import load_tokenizer
from loraplex.types import ModelInfo, OnConflict

#: the exit code that shells give a process which SIGTERM ended
_TERMINATED: Final = 128 + signal.SIGTERM


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("serve", help="serve a base model with adapters over gRPC")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit code."""
    try:
        config = build_config(args)
        check_nodes(config)
    except InvalidConfig as error:
        Console(stderr=True).print(f"loraplex serve: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    set_up_logging(config.server.log_format, config.server.log_level)
    if config.nodes.node_rank:
        return take_part(config)
    try:
        return asyncio.run(_serve(config, Console()))
    except asyncio.CancelledError:  # SIGTERM before it served
        return _TERMINATED


async def _serve(config: Config, console: Console) -> int:
    _end_start_on_sigterm()
    server = config.server
    _check_port(server.host, server.port)
    metrics = Metrics()
    with contextlib.closing(MetricsServer(metrics, server.metrics_host, server.metrics_port)) as metrics_server:
        async with contextlib.AsyncExitStack() as stack:
            with StageProgress(console) as progress:
                base = await asyncio.to_thread(find_base_model, config.model, Path(config.cache_dir), progress.update)
                config = _with_adapter_dirs(config, base)
                tokenizer = await asyncio.to_thread(load_tokenizer, base.path)
                engine = await _start_engine(config, base, progress, stack)
                metrics.set_model(engine.model)
                app = App(config.server, engine, tokenizer, metrics)
                await _load_adapters(config, engine, progress)
                await app.start()
            for line in await _what_is_served(config, engine, metrics_server):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            console.print(f"loraplex {__version__} ready on {app.address}", highlight=False, soft_wrap=True)
            return await app.run()


def _end_start_on_sigterm() -> None:
    """Let SIGTERM end a start as Ctrl-C does, in order, so that no engine and no directory of one stays. A running
    server takes both signals over (``App.run``)."""
    task = asyncio.current_task()
    assert task is not None, "called in a coroutine"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def _start_engine(
    config: Config, base: BaseModelDir, progress: StageProgress, stack: contextlib.AsyncExitStack
) -> EngineHandle:
    """Start the engine and have ``stack`` end it."""
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-", ignore_cleanup_errors=True)))

    async def start(show: Callable[[Loading], None] = lambda loading: None) -> EngineClient:
        shutil.rmtree(home / "text", ignore_errors=True)  # what an engine that died has left
        return await start_engine(config, base.path, base.model_id, show, home)

    first = await start(lambda loading: progress.update(loading.stage, loading.done, loading.total))
    engine = SupervisedEngine(first, start, config.server.engine_restarts)
    stack.push_async_callback(engine.close)
    return engine


async def _load_adapters(config: Config, engine: EngineHandle, progress: StageProgress) -> None:
    """Load what ``--adapter`` names."""
    for index, (name, source) in enumerate(config.adapters.preload):
        progress.update("loading adapters", index, len(config.adapters.preload))
        await engine.load_adapter(name, source, False, OnConflict.FAIL)


async def _what_is_served(config: Config, engine: EngineHandle, metrics_server: MetricsServer) -> tuple[str, ...]:
    """What was resolved, a line each."""
    model = engine.model
    loaded = ", ".join(f"{info.name} ({info.kind})" for info in await engine.list_adapters())
    adapters = loaded or "none yet; load one with `loraplex adapters load NAME SOURCE`"
    backends = ", ".join(f"{op} {name}" for op, name in sorted(model.backends.items()))
    ranks, nnodes = model.tensor_parallel_size, config.nodes.nnodes
    stored = "" if model.quantization == "none" else f" in {model.quantization}"
    where = "this machine" if nnodes == 1 else f"{nnodes} machines"
    return (
        f"model     {model.model_id}: {model.architecture}, {model.dtype} on {model.device}, "
        f"{mebibytes(model.weight_bytes)} MiB of weights{stored}",
        f"limits    {model.max_num_seqs} sequences, {model.max_num_batched_tokens} tokens a step, "
        f"{_pools(model)}, {model.max_model_len} tokens a sequence",
        f"backends  {backends}",
        *([f"ranks     {ranks} on {where}, each with its part of weights and adapters"] if ranks > 1 else ()),
        f"adapters  {adapters}",
        f"metrics   http://{config.server.metrics_host}:{metrics_server.port}/metrics",
    )


def _pools(model: ModelInfo) -> str:
    """What sequences are kept in."""
    pages = f"{model.kv_num_pages} pages of {model.kv_page_size} tokens"
    slots = f"{model.state_num_slots} states of {mebibytes(model.state_slot_bytes)} MiB"
    shown = [pages] if "attention" in model.backends else []
    return ", ".join([*shown, slots] if model.state_num_slots else shown)


def _with_adapter_dirs(config: Config, base: BaseModelDir) -> Config:
    """The configuration with the demo's own adapters loadable."""
    dirs = tuple(dict.fromkeys((*config.adapters.adapter_dirs, *base.adapter_dirs)))
    return msgspec.structs.replace(config, adapters=msgspec.structs.replace(config.adapters, adapter_dirs=dirs))


def _check_port(host: str, port: int) -> None:
    """Refuse a taken port before a model is loaded for it."""
    if port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InvalidConfig(f"port: cannot listen on {host}:{port}: {error.strerror}", field="port") from error
