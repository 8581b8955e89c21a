"""Bad input to a real server: each gives its code, says what, which value, what is allowed and where, and the next
good request is answered."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from loraplex_client import Client, Params, ServerError
from loraplex_proto.v1 import generation_pb2, generation_pb2_grpc
from tests.engines import make_adapters
from tests.servers import MAX_MODEL_LEN, Serving, serve, tiny_base
from tests.tiny import tiny_checkpoint

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
GOOD = Params(max_tokens=4, ignore_eos=True, token_ids=True)
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    return make_adapters(tiny_base(root), root / "allowed", ("all", "one"))


@pytest.fixture(scope="module")
def server(root: Path, adapters: dict[str, Path]) -> Iterator[Serving]:
    arguments = ["--adapter-dir", str(root / "allowed"), "--adapter", f"french={adapters['all']}"]
    with serve(tiny_base(root), root / "log", *arguments) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def good_answers(client: Client) -> list[tuple[int, ...]]:
    return good_tokens(client)


@pytest.fixture(autouse=True)
def goes_on_serving(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each bad input, a good request has the tokens it always has, on the base and on an adapter."""
    if "client" not in request.fixturenames:
        yield
        return
    client, known = request.getfixturevalue("client"), request.getfixturevalue("good_answers")
    yield
    assert good_tokens(client) == known


def good_tokens(client: Client) -> list[tuple[int, ...]]:
    return [client.generate("the fox", GOOD, adapters=name, timeout=10).token_ids for name in ("", "french")]


def refused(call: Callable[[], object]) -> ServerError:
    with pytest.raises(ServerError) as caught:
        call()
    return caught.value


NAN = math.nan
REQUESTS: dict[str, tuple[str | list[int], Params, str, Code, str, tuple[str, ...]]] = {
    "unknown adapter": (
        [5],
        GOOD,
        "frensh",
        Code.NOT_FOUND,
        "adapters",
        ("adapter 'frensh' is not loaded", "did you mean french?"),
    ),
    "empty text": ("", GOOD, "", Code.INVALID_ARGUMENT, "text", ("text: is empty", "at least one character")),
    "no token ids": ([], GOOD, "", Code.INVALID_ARGUMENT, "token_ids.ids", ("is empty", "at least one token id")),
    "too many token ids": (
        [5] * MAX_MODEL_LEN,
        GOOD,
        "french",
        Code.INVALID_ARGUMENT,
        "token_ids.ids",
        ("8192 tokens", "at most 8191"),
    ),
    "text too long": ("x" * 60_000, GOOD, "", Code.INVALID_ARGUMENT, "prompt", ("tokens; at most 8191",)),
    "token id out of range": (
        [5, 300],
        GOOD,
        "",
        Code.INVALID_ARGUMENT,
        "token_ids.ids",
        ("token id 300", "allowed are 0 to 299"),
    ),
    "negative temperature": (
        [5],
        Params(temperature=-1),
        "",
        Code.INVALID_ARGUMENT,
        "sampling.temperature",
        ("-1 is not allowed", "0 to 100"),
    ),
    "NaN temperature": ([5], Params(temperature=NAN), "", Code.INVALID_ARGUMENT, "sampling.temperature", ("nan",)),
    "NaN top_p": ([5], Params(top_p=NAN), "", Code.INVALID_ARGUMENT, "sampling.top_p", ("nan", "0 to 1")),
    "negative min_p": ([5], Params(min_p=-0.1), "", Code.INVALID_ARGUMENT, "sampling.min_p", ("-0.1", "0 to 1")),
    "infinite penalty": (
        [5],
        Params(presence_penalty=math.inf),
        "",
        Code.INVALID_ARGUMENT,
        "sampling.presence_penalty",
        ("inf", "-2 to 2"),
    ),
    "too many stops": (
        [5],
        Params(stop=["x"] * 17),
        "",
        Code.INVALID_ARGUMENT,
        "stop.stop",
        ("17 entries", "at most 16"),
    ),
    "a stop too long": ([5], Params(stop=["x" * 257]), "", Code.INVALID_ARGUMENT, "stop.stop", ("257", "1 to 256")),
    "too many stop tokens": (
        [5],
        Params(stop_token_ids=[7] * 65),
        "",
        Code.INVALID_ARGUMENT,
        "stop.stop_token_ids",
        ("65 entries", "at most 64"),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused(client: Client, name: str) -> None:
    prompt, params, adapter, code, field, parts = REQUESTS[name]
    for call in (
        lambda: client.generate(prompt, params, adapters=adapter, timeout=10),
        lambda: list(client.stream(prompt, params, adapters=adapter, timeout=10)),
    ):
        error = refused(call)
        assert (error.code, error.field) == (code, field), error
        assert all(part in str(error) for part in parts), error


def test_a_message_over_the_limit_is_refused_by_the_transport(client: Client) -> None:
    error = refused(lambda: client.generate("x" * (2 << 20), GOOD, timeout=10))
    assert error.code is Code.RESOURCE_EXHAUSTED
    assert "1048576" in str(error)


def test_bytes_that_are_no_message_are_refused(server: Serving, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        raw = channel.unary_unary("/loraplex.v1.GenerationService/Generate", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            raw(b"\xff\xff\xff", timeout=10)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is Code.UNKNOWN  # the transport's own word: the message never reaches a service
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(generation_pb2.GenerateRequest(), timeout=10)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is Code.INVALID_ARGUMENT


# ---- adapters ----


def header(tensors: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
FILES: dict[str, tuple[Callable[[Path], object], Code, tuple[str, ...]]] = {
    "truncated": (
        lambda d: os.truncate(d / TENSOR_FILE, os.path.getsize(d / TENSOR_FILE) - 8),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE,),
    ),
    "empty file": (lambda d: (d / TENSOR_FILE).write_bytes(b""), Code.INVALID_ARGUMENT, (TENSOR_FILE,)),
    "header length beyond the file": (
        lambda d: (d / TENSOR_FILE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE, str(1 << 62)),
    ),
    "header is not JSON": (
        lambda d: (d / TENSOR_FILE).write_bytes(struct.pack("<Q", 4) + b"\x00\x01{}"),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE,),
    ),
    "overlapping offsets": (
        lambda d: (d / TENSOR_FILE).write_bytes(
            header(
                {f"{Q_PROJ}.lora_A.weight": tensor([2], 0, 8), f"{Q_PROJ}.lora_B.weight": tensor([2], 4, 12)},
                bytes(12),
            )
        ),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE, "lora_B.weight"),
    ),
    "absurd shape": (
        lambda d: (d / TENSOR_FILE).write_bytes(
            header({f"{Q_PROJ}.lora_A.weight": tensor([1 << 40, 1 << 40], 0, 8)}, bytes(8))
        ),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE, "lora_A.weight"),
    ),
    "pickle in place of safetensors": (
        lambda d: (d / TENSOR_FILE).rename(d / "adapter_model.bin"),
        Code.INVALID_ARGUMENT,
        (f"{TENSOR_FILE} is missing", "adapter_model.bin is a pickle", "never read"),
    ),
    "pickle named safetensors": (
        lambda d: (d / TENSOR_FILE).write_bytes(pickle.dumps({"x": list(range(50))})),
        Code.INVALID_ARGUMENT,
        (TENSOR_FILE,),
    ),
    "NaN factors": (lambda d: scale_factors(d, NAN), Code.INVALID_ARGUMENT, (TENSOR_FILE, "lora_", "finite")),
    "factors that change nothing": (lambda d: scale_factors(d, 0), Code.INVALID_ARGUMENT, ("changes nothing",)),
    "no config": (
        lambda d: (d / CONFIG_FILE).unlink(),
        Code.INVALID_ARGUMENT,
        (f"{CONFIG_FILE} is missing",),
    ),
    "config is not JSON": (
        lambda d: (d / CONFIG_FILE).write_text("peft_type: LORA"),
        Code.INVALID_ARGUMENT,
        (CONFIG_FILE, "JSON"),
    ),
    "config is a list": (lambda d: (d / CONFIG_FILE).write_text("[]"), Code.INVALID_ARGUMENT, (CONFIG_FILE, "object")),
    "unknown config key": (
        lambda d: edit(d, nonsense_key=3),
        Code.INVALID_ARGUMENT,
        (CONFIG_FILE, "nonsense_key"),
    ),
    "another kind": (lambda d: edit(d, peft_type="PROMPT_TUNING"), Code.UNIMPLEMENTED, ("PROMPT_TUNING",)),
    "a refused feature": (lambda d: edit(d, use_qalora=True), Code.UNIMPLEMENTED, ("use_qalora",)),
    "a target the base lacks": (
        lambda d: edit(d, target_modules=["wq"]),
        Code.FAILED_PRECONDITION,
        ("target_modules 'wq' matches none", "the model has embed_tokens, q_proj"),
    ),
}


def scale_factors(directory: Path, factor: float) -> None:
    tensors = load_file(directory / TENSOR_FILE)
    save_file({name: tensor * factor for name, tensor in tensors.items()}, directory / TENSOR_FILE)


def edit(directory: Path, **values: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", FILES)
def test_a_bad_adapter_is_refused_and_leaves_nothing(
    client: Client, adapters: dict[str, Path], root: Path, name: str
) -> None:
    spoil, code, parts = FILES[name]
    directory = root / "allowed" / f"bad-{list(FILES).index(name)}"
    shutil.copytree(adapters["one"], directory)
    spoil(directory)
    error = refused(lambda: client.load_adapter("bad", str(directory), timeout=10))
    assert error.code is code, error
    assert all(part in str(error) for part in parts), error
    assert "bad-" in str(error), f"the message does not say where: {error}"
    assert [adapter.name for adapter in client.list_adapters()] == ["french"]


def test_an_adapter_of_another_base_is_refused(client: Client, root: Path) -> None:
    other = tiny_checkpoint(root, "llama", hidden_size=64, head_dim=16)
    path = make_adapters(other, root / "allowed" / "of-another", ("attention",))["attention"]
    error = refused(lambda: client.load_adapter("bad", str(path), timeout=10))
    assert error.code is Code.FAILED_PRECONDITION, error
    assert "q_proj" in str(error), error
    assert "64" in str(error), error
    assert "32" in str(error), error


def test_sources_outside_the_allowed_directories_are_not_permitted(
    client: Client, adapters: dict[str, Path], root: Path
) -> None:
    outside = root / "outside"
    shutil.copytree(adapters["one"], outside)
    (root / "allowed" / "link").symlink_to(outside)
    inside = root / "allowed" / "links-out"
    inside.mkdir()
    shutil.copy(outside / CONFIG_FILE, inside)
    (inside / TENSOR_FILE).symlink_to(outside / TENSOR_FILE)
    for source in (str(outside), "../outside", "link", str(root / "allowed" / ".." / "outside"), "links-out", "/etc"):
        error = refused(lambda source=source: client.load_adapter("bad", source, timeout=10))  # type: ignore[misc]
        assert error.code is Code.PERMISSION_DENIED, (source, error)
        assert source in str(error), error
        assert "allowed directories" in str(error), error
    error = refused(lambda: client.load_adapter("bad", "not-there", timeout=10))
    assert error.code is Code.NOT_FOUND, error
    assert "'not-there' does not exist" in str(error), error
    for source in ("", "a\x00b", "x" * 5000):
        error = refused(lambda source=source: client.load_adapter("bad", source, timeout=10))  # type: ignore[misc]
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "source"), error


def test_bad_names_of_adapters(client: Client, adapters: dict[str, Path]) -> None:
    for name in ("", "../x", "a b", "x" * 129):
        error = refused(lambda name=name: client.load_adapter(name, str(adapters["one"]), timeout=10))  # type: ignore[misc]
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "name"), error
    for call in (lambda: client.unload_adapter("frensh"), lambda: client.get_adapter("frensh")):
        error = refused(call)
        assert error.code is Code.NOT_FOUND, error
        assert "did you mean french?" in str(error), error
    error = refused(lambda: client.load_adapter("french", str(adapters["one"]), timeout=10))
    assert error.code is Code.ALREADY_EXISTS, error
    assert "REPLACE" in str(error), error


def test_the_ends_of_every_range_are_served(client: Client) -> None:
    low = Params(
        max_tokens=3,
        ignore_eos=True,
        token_ids=True,
        temperature=0.001,
        top_p=1e-30,
        top_k=1,
        min_p=1.0,
        repetition_penalty=1e-30,
        presence_penalty=-2,
        frequency_penalty=-2,
        seed=0,
        priority=-(1 << 31),
    )
    high = Params(
        max_tokens=(1 << 32) - 1,
        min_tokens=2,
        stop=["x" * 256] * 16,
        stop_token_ids=list(range(64)),
        token_ids=True,
        temperature=100,
        top_p=1.0,
        top_k=(1 << 32) - 1,
        repetition_penalty=100,
        presence_penalty=2,
        frequency_penalty=2,
        seed=(1 << 64) - 1,
        logprobs=20,
        prompt_logprobs=True,
        priority=(1 << 31) - 1,
    )
    assert len(client.generate([0, 299], low, timeout=10).token_ids) == 3
    assert len(client.generate([5] * (MAX_MODEL_LEN - 3), high, timeout=60).token_ids) in (2, 3)
    for weight in (-100.0, 0.0, 100.0):
        assert client.generate([5], GOOD, adapters={"french": weight}, timeout=10).token_ids
