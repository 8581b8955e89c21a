"""Starts an engine process, and waits until it serves. Knows no protobuf and no torch."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from loraplex.config import Config
from loraplex.engine.client import EngineClient, release
from loraplex.engine.messages import EngineStart, Hello, Loading, Ready, StartFailed, decode_to_front_end, encode
from loraplex.errors import InvalidConfig, Unavailable
from loraplex.parallel.network import group_environment
from loraplex.types import ModelInfo

#: of a socket of the engine's, or of one of its ranks
_LONGEST_NAME: Final = "engine.1023q"


async def start_engine(
    config: Config,
    model_dir: Path,
    model_id: str,
    on_progress: Callable[[Loading], None],
    home: Path | None = None,
) -> EngineClient:
    """Start the engine process and wait until it serves. ``home``: a directory of the server's own, which outlives the
    engine; None: all that the engine has on disk ends with it.

    Raises the LoraplexError it could not start for, or Unavailable if it died without a word.
    """
    directory = home or Path(tempfile.mkdtemp(prefix="loraplex-"))  # mode 0700
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    address = f"ipc://{directory}/engine"
    if len(os.fsencode(directory / _LONGEST_NAME)) > zmq.IPC_PATH_MAX_LEN:
        release(socket, None if home else directory)
        raise InvalidConfig(
            f"the engine's sockets lie in {str(directory)!r}, whose path is too long: with a name in it, at most "
            f"{zmq.IPC_PATH_MAX_LEN} bytes are allowed; set TMPDIR to a shorter directory"
        )
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    start = EngineStart(config, str(model_dir), model_id, address, str(directory / "text"))
    process: asyncio.subprocess.Process | None = None
    try:
        process = await asyncio.create_subprocess_exec(  # asyncio ends the process where this is cancelled
            sys.executable,
            "-m",
            "loraplex.engine.process",
            stdin=asyncio.subprocess.PIPE,
            env=group_environment(config),
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        await process.stdin.drain()
        await socket.send(encode(Hello()))
        model = await _until_ready(process, socket, on_progress)
    except BaseException:
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
        release(socket, None if home else directory)
        raise
    return EngineClient(process, socket, model, None if home else directory, Path(start.text_spool))


async def _until_ready(
    process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, on_progress: Callable[[Loading], None]
) -> ModelInfo:
    death = asyncio.create_task(process.wait())
    try:
        while True:
            incoming = asyncio.ensure_future(socket.recv())
            await asyncio.wait({incoming, death}, return_when=asyncio.FIRST_COMPLETED)
            if not incoming.done():
                incoming.cancel()
                raise Unavailable(f"the engine process ended with exit code {death.result()} while starting")
            match decode_to_front_end(incoming.result()):
                case Ready(model):
                    return model
                case StartFailed(failure):
                    raise failure.to_error()
                case Loading() as loading:
                    on_progress(loading)
                case _:
                    continue
    finally:
        death.cancel()
