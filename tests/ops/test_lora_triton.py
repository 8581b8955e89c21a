"""The device backends of the lora op beyond the contract: tiles, planes, launches, replays, order, refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import pytest
import torch

from loraplex_kernels.lora import Factors, LoraTable, PartDelta, SlotDelta
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_layout import DECODE_ROWS, FORMS, WIDE_ROWS
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import (
    decode_plan,
    expected_output,
    mixed_plan,
    mixed_slots,
    random_scale,
    worst_excess,
)
from tests.ops.lora_device import SMALL_FORMS, PoisonedQueue, Recorder, make_lora
from tests.ops.lora_subjects import BIG, CPU

triton = pytest.importorskip("triton", reason="the package triton is not installed")

IN, PARTS = 45, (40, 24, 7)
WIDTH = sum(PARTS)
TERMS_PLAN = plan_rows(
    [(2, (Term(0, 0.5), Term(3, -1.5))), (1, (Term(1),)), (3, ()), (21, (Term(7, 2.0), Term(5))), (1, (Term(4),))]
)


@pytest.fixture(autouse=True)
def interpreter() -> None:
    from loraplex_kernels.lora.triton import KERNELS

    if not KERNELS.interpreted:
        pytest.skip("kernels are compiled for the GPU of this machine; these tests are of the interpreter")


@pytest.fixture(params=[False, True], ids=["triton", "triton-fused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def table_of(
    backend: DeviceLora, slots: Mapping[int, SlotDelta], in_features: int = IN, parts: tuple[int, ...] = PARTS
) -> LoraTable:
    """A float32 table that holds ``slots``."""
    table = backend.new_table(in_features, parts, dtype=torch.float32, device=CPU, max_bytes=BIG)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    return table


def with_vectors(slots: Mapping[int, SlotDelta], generator: torch.Generator) -> dict[int, SlotDelta]:
    """Every other slot gets scales and shifts, too."""
    made = {}
    for slot, delta in slots.items():
        parts = [
            PartDelta(part and part.factors, random_scale(size, generator), torch.randn(size, generator=generator))
            for part, size in zip(delta.parts, PARTS, strict=True)
        ]
        made[slot] = SlotDelta(tuple(parts), random_scale(IN, generator)) if slot % 2 else delta
    return made


def draw(plan: SegmentPlan, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of a step."""
    x = torch.randn(plan.num_rows, IN, generator=generator)
    return x, torch.randn(plan.num_rows, WIDTH, generator=generator)


def added(backend: DeviceLora, table: LoraTable, y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
    result = y.clone()
    table.add_(result, x, backend.prepare(plan))
    return result


@pytest.mark.parametrize("plan", [TERMS_PLAN, decode_plan([0, 0, 1, 2, 5, 6, 7]), mixed_plan([3, 4, 6, 7], 18)])
def test_many_planes_rank_tiles_and_column_tiles(fused: bool, plan: SegmentPlan, generator: torch.Generator) -> None:
    slots = with_vectors(mixed_slots(8, IN, PARTS, torch.float32, generator), generator)
    backend = make_lora(fused=fused, forms=SMALL_FORMS)
    table = table_of(backend, slots)
    x, y = draw(plan, generator)
    assert worst_excess(added(backend, table, y, x, plan), expected_output(y, x, plan, slots, PARTS), x.dtype) <= 1


def test_a_step_takes_the_form_for_its_rows(fused: bool, generator: torch.Generator) -> None:
    slots = mixed_slots(3, IN, PARTS, torch.float32, generator)
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder)
    table = table_of(backend, slots)
    for num_rows in (WIDE_ROWS + 1, DECODE_ROWS + 1, 5):
        plan = plan_rows([(4, (Term(2),)), (num_rows - 4, (Term(1),))])
        x, y = draw(plan, generator)
        got = added(backend, table, y, x, plan)
        assert worst_excess(got, expected_output(y, x, plan, slots, PARTS), x.dtype) <= 1
    rows = [launch.options["BLOCK_M"] for launch in recorder.launches]
    assert list(dict.fromkeys(rows)) == [FORMS.prefill.block_m, FORMS.wide.block_m, FORMS.decode.block_m]


def test_launches_of_a_table(fused: bool, generator: torch.Generator) -> None:
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder)
    slots = with_vectors(mixed_slots(2, IN, PARTS, torch.float32, generator), generator)
    table = table_of(backend, slots)
    embedding = table_of(backend, mixed_slots(2, 9, PARTS, torch.float32, generator), in_features=9)
    other = table_of(backend, {5: SlotDelta((PartDelta(shift=torch.ones(1)),))}, 1, (1,))

    def launched(plan: SegmentPlan) -> tuple[list[str], ...]:
        x, y = draw(plan, generator)
        prepared, names = backend.prepare(plan), []
        for call in (
            lambda: table.add_(y, x, prepared),
            lambda: table.scale_input(x, prepared),
            lambda: embedding.add_lookup_(y, torch.zeros(plan.num_rows, dtype=torch.int64), prepared),
        ):
            recorder.launches.clear()
            call()
            names.append(recorder.names())
        return tuple(names)

    adding = ["fused"] if fused else ["shrink", "expand"]
    assert launched(decode_plan([0, 1])) == (adding, ["scale"], ["expand"])
    assert launched(decode_plan([0, 0])) == (adding, [], ["expand"])
    assert launched(decode_plan([5, 5])) == ([], [], []), "a table that none of the plan's adapters touches"
    assert launched(plan_rows([(3, ())])) == ([], [], [])
    assert launched(plan_rows([])) == ([], [], [])
    assert other.part_sizes == (1,)


def test_a_grid_is_no_larger_than_the_device_or_the_work(fused: bool, generator: torch.Generator) -> None:
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder, forms=SMALL_FORMS)
    table = table_of(backend, mixed_slots(3, IN, PARTS, torch.float32, generator))
    x, y = draw(decode_plan([0]), generator)
    table.add_(y, x, backend.prepare(decode_plan([0])))
    assert [launch.programs for launch in recorder.launches] == ([1] if fused else [1, 1])  # float32: half of 3


def test_a_replay_serves_other_adapters_than_the_capture(fused: bool, generator: torch.Generator) -> None:
    """Between capture and replay slots appear, grow in rank and vanish, and slot rows and scratch move."""
    slots = mixed_slots(40, IN, PARTS, torch.float32, generator)
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder, forms=SMALL_FORMS)
    holding: tuple[set[int], ...] = ({0, 1}, {1})
    tables = [table_of(backend, {slot: slots[slot] for slot in held}) for held in holding]
    static = backend.static_plan(12, 12)
    assert static is not None
    x, start = torch.randn(12, IN, generator=generator), torch.randn(12, WIDTH, generator=generator)
    ys = [start.clone() for _ in tables]
    assert static.set(decode_plan([0]))
    for table, y in zip(tables, ys, strict=True):
        table.add_(y, x, static)
    num_captured = len(recorder.launches)
    for table, held in zip(tables, holding, strict=True):
        for slot in (2, 5, 39):
            table.write(slot, table.pack(slots[slot]))
            held.add(slot)
    tables[1].clear(1)
    holding[1].remove(1)
    for plan in (
        plan_rows([(1, (Term(5, 0.5), Term(39), Term(1))), (2, ()), (1, (Term(2),))]),
        plan_rows([(3, ())]),
        plan_rows([(8, (Term(2),)), (1, (Term(39),)), (3, (Term(0), Term(1)))]),
    ):
        for y in ys:
            y.copy_(start)
        assert static.set(plan)
        recorder.replay()
        padded = SegmentPlan(12, plan.segments)
        for table, held, y in zip(tables, holding, ys, strict=True):
            expected = expected_output(start, x, padded, {slot: slots[slot] for slot in held}, PARTS)
            assert worst_excess(y, expected, x.dtype) <= 1
            assert torch.equal(y, added(backend, table, start, x, padded))
        del recorder.launches[num_captured:]


def test_static_plans_refuse_what_they_cannot_hold(fused: bool, generator: torch.Generator) -> None:
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder)
    slots = mixed_slots(3, IN, PARTS, torch.float32, generator)
    table = table_of(backend, slots)
    static = backend.static_plan(4, 5)
    assert static is not None
    x, y = torch.randn(4, IN, generator=generator), torch.randn(4, WIDTH, generator=generator)
    fresh = y.clone()
    assert static.segments.segments
    assert static.segments.num_rows == 4
    table.add_(fresh, x, static)
    assert torch.equal(fresh, y)
    assert recorder.launches
    plan = decode_plan([1, 2, 2])
    assert static.set(plan)
    assert not static.set(decode_plan([0] * 5))
    assert not static.set(plan_rows([(1, (Term(0),) * 6)]))
    with pytest.raises(ValueError, match="slot 8, which holds nothing"):
        static.set(decode_plan([8]))
    got = y.clone()
    table.add_(got, x, static)
    expected = expected_output(y, x, SegmentPlan(4, plan.segments), slots, PARTS)
    assert worst_excess(got, expected, y.dtype) <= 1
    assert static.set(plan_rows([(2, (Term(0), Term(1))), (2, ())]))


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(fused: bool, generator: torch.Generator) -> None:
    slots = with_vectors(mixed_slots(8, IN, PARTS, torch.float32, generator), generator)
    backend = make_lora(fused=fused, forms=SMALL_FORMS)
    table = table_of(backend, slots)
    plan = plan_rows([(1, (Term(slot, 0.5), Term(slot // 2))) for slot in range(3, 8)])
    x, y = draw(plan, generator)
    together = added(backend, table, y, x, plan)
    assert torch.equal(together, added(backend, table, y, x, plan))
    for segment in plan.segments:
        row = slice(segment.start, segment.stop)
        alone = added(backend, table, y[row], x[row], plan_rows([(1, segment.terms)]))
        assert torch.equal(alone, together[row])


def test_counters_are_zero_between_fused_launches(generator: torch.Generator) -> None:
    recorder = Recorder()
    backend = make_lora(fused=True, recorder=recorder, forms=SMALL_FORMS)
    slots = with_vectors(mixed_slots(8, IN, PARTS, torch.float32, generator), generator)
    table = table_of(backend, slots | {8: SlotDelta((None, PartDelta(shift=torch.ones(24)), None))})
    for plan in (TERMS_PLAN, decode_plan(range(9)), decode_plan([8])):
        x, y = draw(plan, generator)
        table.add_(y, x, backend.prepare(plan))
        header = recorder.launches[-1].args[4]
        assert isinstance(header, torch.Tensor)
        num_pairs = sum(len(segment.terms) for segment in plan.segments) + 4
        assert not any((ctypes.c_int32 * num_pairs).from_address(int(header[2])))


def test_keys_tell_scaled_inputs_apart(fused: bool, generator: torch.Generator) -> None:
    backend = make_lora(fused=fused)
    slots = mixed_slots(3, IN, PARTS, torch.float32, generator)
    scaled = SlotDelta(slots[1].parts, random_scale(IN, generator))
    first, second = table_of(backend, slots), table_of(backend, slots)
    key = backend.graph_key
    assert key(decode_plan([0])) == key(decode_plan([1, 2, 2])) != key(decode_plan([None]))
    plain = key(decode_plan([0]))
    first.write(1, first.pack(scaled))
    assert key(decode_plan([0])) == key(decode_plan([2])) == plain != key(decode_plan([1, 2]))
    second.write(1, second.pack(scaled))
    first.write(1, first.pack(slots[1]))
    assert key(decode_plan([1])) != plain, "the other table still scales for it"
    second.clear(1)
    assert key(decode_plan([1])) == plain
    static = backend.static_plan(3, 3)
    assert static is not None
    second.write(2, second.pack(scaled))
    assert [key(decode_plan([slot])) for slot in (0, 2)] == list(static.keys)


def test_a_replay_scales_the_inputs_of_adapters_loaded_since(fused: bool, generator: torch.Generator) -> None:
    """A graph captured when no slot scaled: rows of slots that do not, of none, and past the step's keep their bits."""
    recorder = Recorder()
    backend = make_lora(fused=fused, recorder=recorder, forms=SMALL_FORMS)
    slots = mixed_slots(4, IN, PARTS, torch.float32, generator)
    scale = random_scale(IN, generator)
    table = table_of(backend, slots)
    static = backend.static_plan(7, 14)
    assert static is not None
    x = torch.randn(7, IN, generator=generator)
    plain, scaling = (static.capturing(key) for key in static.keys)
    assert table.scale_input(x, plain) is x
    out = table.scale_input(x, scaling)
    assert torch.equal(out, x)
    (launch,) = recorder.launches
    table.write(2, table.pack(SlotDelta(slots[2].parts, scale)))
    table.write(9, table.pack(SlotDelta((None,) * len(PARTS), 2 * scale)))
    segments = [(1, (Term(0),)), (1, ()), (2, (Term(2),)), (1, (Term(0), Term(9, 0.5), Term(2, -1.0))), (1, ())]
    assert static.set(plan_rows(segments))
    assert (plain.segments, scaling.segments) == (static.segments, static.segments)
    out.fill_(float("nan"))
    launch()
    expected = x.clone()
    expected[2:4] *= scale
    expected[4] *= 1 + 0.5 * (2 * scale - 1) - (scale - 1)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    kept = [0, 1, 5, 6]
    assert torch.equal(out[kept], x[kept])


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        (torch.zeros(2, WIDTH), torch.zeros(2, IN, dtype=torch.float64), "x is torch.float64 .* the table needs"),
        (torch.zeros(2, WIDTH, dtype=torch.float16), torch.zeros(2, IN), "y is torch.float16 .* the table needs"),
        (torch.zeros(WIDTH, 2).t(), torch.zeros(2, IN), "strides .* y's rows whole"),
        (torch.zeros(2, WIDTH), torch.zeros(2, IN + 1), f"the table needs {IN} columns"),
        (torch.zeros(2, WIDTH), torch.zeros(2, IN, device="meta"), "x is torch.float32 on meta"),
    ],
)
def test_kernels_are_never_given_wrong_memory(fused: bool, y: torch.Tensor, x: torch.Tensor, message: str) -> None:
    backend = make_lora(fused=fused)
    table = table_of(backend, {0: SlotDelta((PartDelta(shift=torch.ones(40)), None, None))})
    with pytest.raises(ValueError, match=message):
        table.add_(y, x, backend.prepare(decode_plan([0, 0])))


def test_what_must_not_alias_and_wrong_ids_are_refused(fused: bool) -> None:
    backend = make_lora(fused=fused)
    table = table_of(backend, {0: SlotDelta((PartDelta(shift=torch.ones(4)),))}, 4, (4,))
    plan = backend.prepare(decode_plan([0, 0]))
    both = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="does not alias y"):
        table.add_(both[:2], both[1:], plan)
    with pytest.raises(ValueError, match=r"token ids are torch.int32 \[2\]"):
        table.add_lookup_(both[:2], torch.zeros(2, dtype=torch.int32), plan)
    with pytest.raises(ValueError, match="kernels take <"):
        backend.new_table(1 << 24, (1,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    with pytest.raises(ValueError, match="first table is on cpu"):
        backend.new_table(1, (1,), dtype=torch.float32, device=torch.device("meta"), max_bytes=BIG)


def test_ids_outside_the_vocabulary_read_no_other_memory(fused: bool) -> None:
    backend = make_lora(fused=fused)
    table = table_of(backend, {0: SlotDelta((PartDelta(Factors(torch.ones(1, 3), torch.ones(4, 1))),))}, 3, (4,))
    y = torch.zeros(3, 4)
    table.add_lookup_(y, torch.tensor([-1, 2, 3]), backend.prepare(decode_plan([0, 0, 0])))
    assert y.sum(1).tolist() == [0.0, 4.0, 0.0]


class FullQueue(PoisonedQueue):
    """A device with room for so many bytes at a time, and no more."""

    room = BIG

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.room:
            raise MemoryError(f"cpu has no room for {nbytes} bytes")
        return super().allocate(nbytes)


def test_a_full_device_leaves_the_slot_as_it_was(fused: bool, generator: torch.Generator) -> None:
    queue = FullQueue(CPU)
    backend = make_lora(fused=fused, queue=queue)
    slots = mixed_slots(8, IN, PARTS, torch.float32, generator)
    table = table_of(backend, {2: slots[2]})
    plan = decode_plan([2])
    x, y = draw(plan, generator)
    before = added(backend, table, y, x, plan)
    packed = table.pack(slots[7])
    for room in (packed.nbytes - 1, 64):
        queue.room = room
        for slot in (2, 300):
            with pytest.raises(MemoryError, match=r"no room for \d+ bytes"):
                table.write(slot, packed)
        queue.room = BIG
        assert torch.equal(added(backend, table, y, x, plan), before)
        with pytest.raises(ValueError, match="slot 300, which holds nothing"):
            backend.prepare(decode_plan([300]))
    table.write(2, packed)
    assert (
        worst_excess(added(backend, table, y, x, plan), expected_output(y, x, plan, {2: slots[7]}, PARTS), y.dtype) <= 1
    )
