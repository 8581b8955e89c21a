"""What our CPU kernels are written with: vectors of this processor in LLVM's own language, and its compiler."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from llvmlite import binding as llvm
from llvmlite import ir

from loraplex_kernels.lanes import LANES, VECTOR_BYTES

#: bytes that are asked for ahead of use: factors come from main memory, a page at a time
PREFETCH_BYTES: Final = 8192

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
PTR = ir.PointerType()

Value = Any  # llvmlite has no types
Body = Callable[[Value, list[Value]], list[Value]]  # (index, values) -> the next values
Kernel = Callable[..., None]


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite's builder lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether small segments of this type can be compiled for this processor."""
    features = llvm.get_host_cpu_features()
    wide = bool(features.get("avx512f"))
    return wide and (dtype is torch.float32 or (dtype is torch.bfloat16 and bool(features.get("avx512bf16"))))


def has_vectors() -> bool:
    """Whether vectors of floats without any instruction of their own make good code: AVX2 with what came with it, or an
    ARM of 64 bits."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in ("avx2", "fma", "f16c"))


def compile_function(module: ir.Module, name: str, processor: str = "") -> Kernel:
    """The module's function of that name, which takes 64-bit integers and returns nothing.

    ``processor``: compile for an older one of LLVM's, which this one can stand in for; "": this one.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor or llvm.get_host_cpu_name(),
        features="" if processor else llvm.get_host_cpu_features().flatten(),
        opt=3,
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    num_arguments = len(module.globals[name].args)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_arguments)(engine.get_function_address(name))
    call.engine = engine  # type: ignore[attr-defined]  # the code lives as long as the function
    return call


def loop(b: Value, count: Value, init: Iterable[Value], body: Body) -> list[Value]:
    """``for i in range(count): values = body(i, values)``; returns the last values."""
    before, head = b.block, b.append_basic_block("head")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(I64(0), before)
    values = []
    for start in init:
        values.append(b.phi(start.type))
        values[-1].add_incoming(start, before)
    inside, done = b.append_basic_block("body"), b.append_basic_block("done")
    b.cbranch(b.icmp_unsigned("<", index, count), inside, done)
    b.position_at_end(inside)
    new = body(index, values)
    index.add_incoming(b.add(index, I64(1)), b.block)
    for value, update in zip(values, new, strict=True):
        value.add_incoming(update, b.block)
    b.branch(head)
    b.position_at_end(done)
    return values


class Pieces:
    """A module, and the small pieces that functions over one dtype's vectors are made of."""

    def __init__(self, bfloat16: bool) -> None:
        self.bf = bfloat16
        self.item = 2 if bfloat16 else 4
        self.width = VECTOR_BYTES // self.item
        self.element = BFloat() if bfloat16 else F32
        self.stored = ir.VectorType(self.element, self.width)  # 64 bytes of A, x or B
        self.sum = ir.VectorType(F32, LANES)
        self.columns = ir.VectorType(self.element, LANES)  # 16 columns of y
        self.module = ir.Module("lora")

    def declare(self, name: str, result: Value, *arguments: Value) -> Value:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def at(self, b: Value, base: Value, offset: Value) -> Value:
        """``base + offset`` bytes."""
        return b.gep(base, [offset], source_etype=ir.IntType(8))

    def load(self, b: Value, base: Value, offset: Value, kind: Value) -> Value:
        return b.load(self.at(b, base, offset), typ=kind, align=1)

    def prefetch(self, b: Value, pointer: Value) -> None:
        """Ask for what is read ``PREFETCH_BYTES`` later; past a slot's end this costs nothing and never faults."""
        ask = self.declare("llvm.prefetch.p0", ir.VoidType(), PTR, I32, I32, I32)
        b.call(ask, [self.at(b, pointer, I64(PREFETCH_BYTES)), I32(0), I32(3), I32(1)])

    def least(self, b: Value, one: Value, other: Value) -> Value:
        return b.select(b.icmp_signed("<", one, other), one, other)

    def most(self, b: Value, one: Value, other: Value) -> Value:
        return b.select(b.icmp_signed(">", one, other), one, other)

    def splat(self, b: Value, scalar: Value, lanes: int) -> Value:
        kind = ir.VectorType(scalar.type, lanes)
        one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return b.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        )

    def mask(self, b: Value, first: Value, limit: Value, lanes: int) -> Value:
        """Lane l is on when ``first + l < limit``."""
        lane = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        place = b.add(self.splat(b, first, lanes), lane)
        return b.icmp_unsigned("<", place, self.splat(b, limit, lanes))

    def name(self, kind: Value) -> str:
        return f"v{kind.count}{'bf16' if kind.element == BFloat() else 'f32'}"

    def load_masked(self, b: Value, pointer: Value, mask: Value, kind: Value) -> Value:
        masks = ir.VectorType(I1, kind.count)
        load = self.declare(f"llvm.masked.load.{self.name(kind)}.p0", kind, PTR, I32, masks, kind)
        return b.call(load, [pointer, I32(1), mask, ir.Constant(kind, None)])

    def store_masked(self, b: Value, value: Value, pointer: Value, mask: Value) -> None:
        masks = ir.VectorType(I1, value.type.count)
        store = self.declare(
            f"llvm.masked.store.{self.name(value.type)}.p0", ir.VoidType(), value.type, PTR, I32, masks
        )
        b.call(store, [value, pointer, I32(1), mask])

    def mac(self, b: Value, total: Value, left: Value, right: Value) -> Value:
        """``total + left * right``, pairs of bfloat16 summed into a lane."""
        if self.bf:
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            dot = self.declare(name, self.sum, self.sum, self.stored, self.stored)
            return b.call(dot, [total, left, right])
        fma = self.declare("llvm.fma.v16f32", self.sum, self.sum, self.sum, self.sum)
        return b.call(fma, [left, right, total])

    def total(self, b: Value, lanes: Value) -> Value:
        add = self.declare("llvm.vector.reduce.fadd.v16f32", F32, F32, self.sum)
        return b.call(add, [ir.Constant(F32, 0.0), lanes], fastmath=("reassoc",))
