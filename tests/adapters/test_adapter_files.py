"""The safetensors reader against well-formed and hostile files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraplex.adapters.reading.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS, parse_header, read_tensors
from loraplex.errors import InvalidAdapter, OverCapacity
from tests.fakes_adapters import framed, safetensors_bytes

MAX = 1 << 20


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read(path: Path, raw: bytes, max_bytes: int = MAX) -> dict[str, torch.Tensor]:
    path = path / "m.safetensors"
    path.write_bytes(raw)
    with opened(path) as fd:
        return read_tensors(fd, "m.safetensors", max_bytes=max_bytes).tensors


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, 2).half(),
        "c.weight": torch.randn(4, 1, 2).bfloat16(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    digest = hashlib.sha256()
    with opened(file) as fd:
        found = read_tensors(fd, "x", max_bytes=MAX, digest=digest).tensors
    assert digest.hexdigest() == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "0 tensors"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"a": ' + b'{"b": ' * 30_000 + b"1" + b"}" * 30_001, "nested too deeply"),
        (
            json.dumps({"w": entry()})[:-1].encode() + b', "w": ' + json.dumps(entry()).encode() + b"}",
            "'w' appears twice",
        ),
        (b'{"w": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "'shape' appears twice"),
        (b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN is not JSON"),
        (b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', "overflows"),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "not valid JSON"),
        (json.dumps({"__metadata__": {"a": 1}, "w": entry()}).encode(), "__metadata__ must map"),
        (json.dumps({"w": 3}).encode(), "exactly dtype, shape and data_offsets"),
        (json.dumps({"w": {**entry(), "more": 1}}).encode(), "exactly dtype, shape and data_offsets"),
        (json.dumps({"w": entry(dtype="I64")}).encode(), "tensor 'w' has dtype 'I64'"),
        (json.dumps({"w": entry(dtype=["F32"])}).encode(), "tensor 'w' has dtype"),
        (json.dumps({"w": entry(shape=[True, 2])}).encode(), "shape of tensor 'w'"),
        (json.dumps({"w": entry(shape=[-2])}).encode(), "shape of tensor 'w'"),
        (json.dumps({"w": entry(shape=[2.0])}).encode(), "shape of tensor 'w'"),
        (json.dumps({"w": entry(shape="2")}).encode(), "shape of tensor 'w'"),
        (json.dumps({"w": entry(shape=[1 << 62, 1 << 62])}).encode(), "shape of tensor 'w'"),
        (json.dumps({"w": entry(shape=[1, 1, 1, 2])}).encode(), "4 dimensions"),
        (json.dumps({"w": entry(shape=[3])}).encode(), "takes 12 bytes, its data_offsets span 8"),
        (json.dumps({"w": entry(offsets=[8, 0])}).encode(), "begin <= end"),
        (json.dumps({"w": entry(offsets=[0, 8, 8])}).encode(), "begin <= end"),
        (json.dumps({"w": entry(offsets=[0, True])}).encode(), "data_offsets of tensor 'w'"),
        (json.dumps({"w": entry(offsets=[8, 16])}).encode(), "begins at byte 8"),
        (json.dumps({"v": entry(), "w": entry(offsets=[4, 12])}).encode(), "without gap or overlap"),
        (json.dumps({"w": entry(shape=[1], offsets=[0, 4])}).encode(), "declares 4 bytes of data, the file holds 8"),
        (json.dumps({"w": entry(shape=[4], offsets=[0, 16])}).encode(), "declares 16 bytes of data, the file holds 8"),
        (json.dumps({"../w": entry()}).encode(), "not plain"),
        (json.dumps({"a/w": entry()}).encode(), "not plain"),
        (json.dumps({"w\n": entry()}).encode(), "not plain"),
        (json.dumps({"ẃ": entry()}).encode(), "not plain"),
        (json.dumps({"": entry()}).encode(), "not plain"),
        (json.dumps({"w" * 600: entry()}).encode(), "not plain"),
    ],
)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read(tmp_path, framed(header, b"\0" * 8))
    assert message in str(caught.value)
    assert str(caught.value).startswith("m.safetensors")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"\1\0\0", "too short"),
        (b"\xff" * 8 + b"{}", "header length is 18446744073709551615"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1), "header length"),
        ((100).to_bytes(8, "little") + b"{}", "header length is 100"),
    ],
)
def test_bad_lengths(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        read(tmp_path, raw, max_bytes=16 << 20)


def test_too_many_tensors_are_refused_before_they_are_parsed() -> None:
    body = ",".join(
        f'"t{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(MAX_TENSORS + 1)
    )
    with pytest.raises(InvalidAdapter, match="20001 tensors"):
        parse_header(f"{{{body}}}".encode(), 0, "f")
    flood = ("{" + ",".join(f'"{index}":{{}}' for index in range(300_000)) + "}").encode()
    started = time.perf_counter()
    with pytest.raises(InvalidAdapter, match="more than 20000 tensors"):
        parse_header(flood, 0, "f")
    assert time.perf_counter() - started < 0.5


def test_larger_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(OverCapacity, match="at most 16 are allowed"):
        read(tmp_path, safetensors_bytes({"w": torch.ones(8)}), max_bytes=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_refused(tmp_path: Path, dtype: torch.dtype, poison: float) -> None:
    bad = torch.ones(5, 3, dtype=dtype)
    bad[4, 2] = poison
    with pytest.raises(InvalidAdapter, match=r"m\.safetensors: tensor 'bad\.w' holds NaN or Inf"):
        read(tmp_path, safetensors_bytes({"good.w": torch.ones(2), "bad.w": bad}))


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([3 << 20], 5), ([1 << 18] * 12, 2), ([1 << 18] * 3, 0)],
    ids=["before and within a large tensor, and within its check", "between small ones", "of a small file none"],
)
def test_other_work_gets_its_turn_every_4_mib(tmp_path: Path, sizes: list[int], count: int) -> None:
    save_file({f"w{place}": torch.ones(size) for place, size in enumerate(sizes)}, tmp_path / "x")
    turns: list[None] = []
    with opened(tmp_path / "x") as fd:
        read_tensors(fd, "x", max_bytes=1 << 30, give_way=lambda: turns.append(None))
    assert len(turns) == count


def test_a_poisoned_value_behind_the_first_chunk_is_found(tmp_path: Path) -> None:
    large = torch.ones(3 << 20)
    large[-1] = float("nan")
    save_file({"w": large}, tmp_path / "x")
    with opened(tmp_path / "x") as fd, pytest.raises(InvalidAdapter, match="NaN or Inf"):
        read_tensors(fd, "x", max_bytes=1 << 30)


def test_not_a_regular_file(tmp_path: Path) -> None:
    with opened(tmp_path) as fd, pytest.raises(InvalidAdapter, match="not a regular file"):
        read_tensors(fd, "x", max_bytes=MAX)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_header_parses_or_is_refused(raw: bytes) -> None:
    try:
        parse_header(raw, 8, "f")
    except InvalidAdapter as error:
        assert str(error).startswith("f")  # noqa: PT017


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=8), entries | json_values, max_size=4), st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_covers_the_data_exactly(header: dict[str, object], data_bytes: int) -> None:
    try:
        found = parse_header(json.dumps(header).encode(), data_bytes, "f").entries
    except InvalidAdapter:
        return
    covered = sorted(place for item in found for place in range(item.begin, item.end))
    assert covered == list(range(data_bytes))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_changed_byte_never_escapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(safetensors_bytes({"a": torch.ones(2, 3), "b": torch.ones(4).half()}))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) - 4, len(raw)))]
    try:
        found = read(tmp_path_factory.getbasetemp(), bytes(raw))
    except (InvalidAdapter, OverCapacity):
        return
    assert sum(tensor.nbytes for tensor in found.values()) == 32
