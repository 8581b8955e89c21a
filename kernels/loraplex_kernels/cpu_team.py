"""Compiled kernels on all threads: those of torch's own OpenMP team, so that a step keeps one team that spins or sleeps
together (``GOMP_parallel`` of the library that torch has loaded). Without that library one thread does all."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from llvmlite import binding as llvm
from llvmlite import ir

from loraplex_kernels.cpu_ir import I32, I64, PTR, Pieces, Value


@functools.cache
def has_team() -> bool:
    """Whether torch's OpenMP library is there; makes its functions known to the compiler."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        library = ctypes.CDLL(str(path))
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            llvm.add_symbol(name, address)
        return True
    return False


def emit_entry(pieces: Pieces, name: str, arguments: Sequence[str], worker: Value) -> None:
    """Emit the function ``name`` of these int64 arguments, which runs ``worker(packed)`` on each of ``threads``."""
    function = ir.Function(pieces.module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), name)
    b = ir.IRBuilder(function.append_basic_block())
    packed = b.bitcast(b.alloca(I64, size=len(arguments)), PTR)
    for i, value in enumerate(function.args):
        b.store(value, b.gep(packed, [I64(i)], source_etype=I64))
    threads = function.args[list(arguments).index("threads")]
    if not has_team():
        b.call(worker, [packed])
        b.ret_void()
        return
    alone = b.icmp_unsigned("<=", threads, I64(1))
    with b.if_else(alone) as (one, several):
        with one:
            b.call(worker, [packed])
        with several:
            parallel = pieces.declare("GOMP_parallel", ir.VoidType(), PTR, PTR, I32, I32)
            b.call(parallel, [b.bitcast(worker, PTR), packed, b.trunc(threads, I32), I32(0)])
    b.ret_void()


def begin_worker(pieces: Pieces) -> tuple[Value, Value]:
    """A new function for ``emit_entry``, and the builder at its start."""
    function = ir.Function(pieces.module, ir.FunctionType(ir.VoidType(), [PTR]), "worker")
    function.linkage = "internal"
    return function, ir.IRBuilder(function.append_basic_block())


def emit_place(pieces: Pieces, b: Value) -> tuple[Value, Value]:
    """Which thread this is, and of how many: 0 and 1 outside of a team."""
    if not has_team():
        return I64(0), I64(1)
    mine, team = (
        b.zext(b.call(pieces.declare(f"omp_get_{what}", I32), []), I64) for what in ("thread_num", "num_threads")
    )
    return mine, team


def read_fields(b: Value, base: Value, names: Sequence[str]) -> dict[str, Value]:
    """int64 values that lie one after another at ``base``."""
    return {name: b.load(b.gep(base, [I64(i)], source_etype=I64), typ=I64) for i, name in enumerate(names)}
