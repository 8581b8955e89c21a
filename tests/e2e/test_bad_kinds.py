"""Bad adapters of every kind, and requests that no sum of adapters answers, to a real server: each gives its code, says
what is wrong and where, and changes nothing: the same adapters are there, good requests have the tokens they had."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

from loraplex.types import MAX_ADAPTERS_PER_REQUEST
from loraplex_client import Client, Params, ServerError
from tests.peft_kinds import Recipe, save
from tests.servers import VOCAB_SIZE, Serving, serve, tiny_base

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PARAMS = Params(max_tokens=4, ignore_eos=True, token_ids=True)
Code = grpc.StatusCode
INVOCATION = (31, 32, 33)
PROMPT = (5, 6, 7, 8)


def _lora(**config: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config})


RECIPES = {
    "lora": Recipe(_lora()),
    "dora": Recipe(_lora(use_dora=True)),
    "dora-too": Recipe(_lora(use_dora=True, target_modules=["v_proj"])),
    "ia3": Recipe(lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "norms": Recipe(lambda: LNTuningConfig(target_modules=["input_layernorm"])),
    "tokens": Recipe(lambda: TrainableTokensConfig(token_indices=[5, 8])),
    "head": Recipe(_lora(modules_to_save=["lm_head"])),
    "head-too": Recipe(_lora(modules_to_save=["lm_head"])),
    "alora": Recipe(_lora(alora_invocation_tokens=list(INVOCATION))),
    "added": Recipe(_lora(trainable_token_indices=[VOCAB_SIZE, VOCAB_SIZE + 1]), vocab_size=VOCAB_SIZE + 2),
    "embedding": Recipe(_lora(target_modules=["embed_tokens"])),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-kinds")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    base = tiny_base(root)
    return {
        name: save(recipe, base, root / "allowed" / name, seed=seed)
        for seed, (name, recipe) in enumerate(RECIPES.items())
    }


@pytest.fixture(scope="module")
def server(root: Path, adapters: dict[str, Path]) -> Iterator[Serving]:
    loaded = [f"--adapter={name}={path}" for name, path in adapters.items()]
    with serve(tiny_base(root), root / "log", "--adapter-dir", str(root / "allowed"), *loaded) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def as_it_was(client: Client) -> tuple[object, ...]:
    return state(client)


@pytest.fixture(autouse=True)
def nothing_changed(client: Client, as_it_was: tuple[object, ...]) -> Iterator[None]:
    yield
    assert state(client) == as_it_was


def state(client: Client) -> tuple[object, ...]:
    """What is loaded, and what it answers."""
    loaded = [(adapter.name, adapter.uid, adapter.state, adapter.in_flight) for adapter in client.list_adapters()]
    return loaded, [client.generate(PROMPT, PARAMS, adapters=name).token_ids for name in ("", *RECIPES)]


def refused(call: Callable[[], object]) -> ServerError:
    with pytest.raises(ServerError) as caught:
        call()
    return caught.value


def edit(directory: Path, **values: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Each tensor by ``change``; those it gives None for are left out."""
    changed = {name: change(name, tensor) for name, tensor in load_file(directory / TENSOR_FILE).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, directory / TENSOR_FILE)


def one_element(value: float) -> Callable[[Path], None]:
    """One element of every tensor is ``value``."""

    def spoil(directory: Path) -> None:
        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[tensor.numel() // 2] = value
            return tensor

        rewrite(directory, change)

    return spoil


def as_type(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda name, tensor: tensor.to(dtype))


def without(part: str) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda name, tensor: None if part in name else tensor)


def cut(part: str) -> Callable[[Path], None]:
    """Tensors named with ``part`` lose their last row."""
    return lambda directory: rewrite(
        directory, lambda name, tensor: tensor[:-1].contiguous() if part in name else tensor
    )


def with_extra(directory: Path) -> None:
    tensors = load_file(directory / TENSOR_FILE)
    first = next(iter(tensors))
    save_file({**tensors, first.replace("layers.0", "layers.7"): tensors[first].clone()}, directory / TENSOR_FILE)


#: kind -> what spoils its directory, and what is answered
FILES: Mapping[str, tuple[str, Callable[[Path], None], Code, tuple[str, ...]]] = {
    "a rank that is not the tensors'": (
        "lora",
        lambda d: edit(d, r=3),
        Code.INVALID_ARGUMENT,
        ("rank 2", "adapter_config.json says 3"),
    ),
    "alpha 0": ("lora", lambda d: edit(d, lora_alpha=0), Code.INVALID_ARGUMENT, ("lora_alpha is 0", "above 0")),
    "alpha of text": ("lora", lambda d: edit(d, lora_alpha="8"), Code.INVALID_ARGUMENT, ("lora_alpha is '8'",)),
    "no B": ("lora", without("lora_B"), Code.INVALID_ARGUMENT, ("without lora_B",)),
    "a tensor too many": ("lora", with_extra, Code.FAILED_PRECONDITION, ("layers.7",)),
    "integers": ("lora", as_type(torch.int64), Code.INVALID_ARGUMENT, ("I64",)),
    "NaN in a LoRA": ("lora", one_element(math.nan), Code.INVALID_ARGUMENT, ("finite", "lora_")),
    "infinity in a DoRA": ("dora", one_element(math.inf), Code.INVALID_ARGUMENT, ("finite",)),
    "a DoRA without magnitudes": ("dora", without("magnitude"), Code.INVALID_ARGUMENT, ("lora_magnitude_vector",)),
    "a DoRA's magnitudes cut": ("dora", cut("magnitude"), Code.FAILED_PRECONDITION, ("lora_magnitude_vector",)),
    "NaN in an IA3": ("ia3", one_element(math.nan), Code.INVALID_ARGUMENT, ("finite", "ia3_l")),
    "an IA3's vector cut": ("ia3", cut("ia3_l"), Code.FAILED_PRECONDITION, ("ia3_l",)),
    "infinity in a norm": ("norms", one_element(-math.inf), Code.INVALID_ARGUMENT, ("finite",)),
    "a norm cut": ("norms", cut("layernorm"), Code.FAILED_PRECONDITION, ("input_layernorm",)),
    "NaN in a token's row": ("tokens", one_element(math.nan), Code.INVALID_ARGUMENT, ("finite",)),
    "a token index past the vocabulary": (
        "tokens",
        lambda d: edit(d, token_indices=[5, VOCAB_SIZE]),
        Code.INVALID_ARGUMENT,
        ("token 300 has no row at 'lm_head'",),
    ),
    "a token index below 0": ("tokens", lambda d: edit(d, token_indices=[5, -1]), Code.INVALID_ARGUMENT, ("-1",)),
    "a token index twice": ("tokens", lambda d: edit(d, token_indices=[5, 5]), Code.INVALID_ARGUMENT, ("5",)),
    "fewer rows than token indices": (
        "tokens",
        lambda d: edit(d, token_indices=[5, 8, 9]),
        Code.FAILED_PRECONDITION,
        ("shape [2, 32], expected [3, 32]",),
    ),
    "NaN in a saved head": ("head", one_element(math.nan), Code.INVALID_ARGUMENT, ("finite",)),
    "a saved head that lost a token": ("head", cut("lm_head"), Code.FAILED_PRECONDITION, ("299 tokens",)),
    "a saved head of integers": ("head", as_type(torch.int64), Code.INVALID_ARGUMENT, ("I64",)),
    "a saved head that is not there": (
        "lora",
        lambda d: edit(d, modules_to_save=["lm_head"]),
        Code.INVALID_ARGUMENT,
        ("lm_head",),
    ),
    "invocation tokens past the vocabulary": (
        "alora",
        lambda d: edit(d, alora_invocation_tokens=[5, VOCAB_SIZE]),
        Code.INVALID_ARGUMENT,
        ("alora_invocation_tokens has 300", "0 to 299"),
    ),
    "no invocation tokens": (
        "alora",
        lambda d: edit(d, alora_invocation_tokens=["x"]),
        Code.INVALID_ARGUMENT,
        ("alora_invocation_tokens",),
    ),
    "an added row that is not there": (
        "added",
        lambda d: edit(d, trainable_token_indices=[VOCAB_SIZE, VOCAB_SIZE + 7]),
        Code.INVALID_ARGUMENT,
        ("token 307 lies past the vocabulary of 302 tokens",),
    ),
    "a type that is not served": (
        "lora",
        lambda d: edit(d, peft_type="PREFIX_TUNING"),
        Code.UNIMPLEMENTED,
        ("peft_type", "PREFIX_TUNING"),
    ),
    "a type that nobody knows": ("lora", lambda d: edit(d, peft_type="LORAX"), Code.INVALID_ARGUMENT, ("LORAX",)),
    "a feature that is not served": (
        "lora",
        lambda d: edit(d, use_qalora=True),
        Code.UNIMPLEMENTED,
        ("use_qalora",),
    ),
    "initial weights of a changed base": (
        "lora",
        lambda d: edit(d, init_lora_weights="pissa"),
        Code.UNIMPLEMENTED,
        ("init_lora_weights", "path_initial_model_for_weight_conversion"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_adapter(client: Client, adapters: dict[str, Path], root: Path, name: str) -> None:
    kind, spoil, code, parts = FILES[name]
    directory = root / "allowed" / f"bad-{list(FILES).index(name)}"
    shutil.copytree(adapters[kind], directory)
    spoil(directory)
    error = refused(lambda: client.load_adapter("bad", str(directory), timeout=20))
    assert error.code is code, error
    assert all(part in str(error) for part in parts), error
    assert directory.name in str(error), f"the message does not say where: {error}"


ADDED = VOCAB_SIZE + 1
#: adapters, prompt, and what is in the answer
REQUESTS: Mapping[str, tuple[dict[str, float], tuple[int, ...], tuple[str, ...]]] = {
    "two DoRAs": ({"dora": 1, "dora-too": 1}, PROMPT, ("'dora' and 'dora-too' have no sum", "magnitudes")),
    "two saved heads": ({"head": 1, "head-too": 1}, PROMPT, ("'head' and 'head-too' have no sum", "saved module")),
    "a weighted head": ({"head": 0.5, "lora": 1}, PROMPT, ("'head' has weight 0.5, allowed is 1",)),
    "weighted norms": ({"norms": -1}, PROMPT, ("'norms' has weight -1, allowed is 1",)),
    "weighted tokens": ({"tokens": 2}, PROMPT, ("'tokens' has weight 2, allowed is 1",)),
    "too many adapters": (
        {f"n{index}": 1.0 for index in range(MAX_ADAPTERS_PER_REQUEST + 1)},
        PROMPT,
        (str(MAX_ADAPTERS_PER_REQUEST),),
    ),
    "a weight of no size": ({"lora": math.nan}, PROMPT, ("weight",)),
    "a new token for the base": ({}, (5, ADDED), (f"token id {ADDED}", f"0 to {VOCAB_SIZE - 1}")),
    "another adapter's token": ({"lora": 1}, (5, ADDED), (f"token id {ADDED}", f"0 to {VOCAB_SIZE - 1}")),
    "a token that nobody knows": ({"added": 1}, (5, ADDED + 1), (f"token id {ADDED + 1}", f"0 to {ADDED}")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request(client: Client, name: str) -> None:
    weights, prompt, parts = REQUESTS[name]
    for call in (
        lambda: client.generate(prompt, PARAMS, adapters=weights, timeout=10),
        lambda: list(client.stream(prompt, PARAMS, adapters=weights, timeout=10)),
    ):
        error = refused(call)
        assert error.code is Code.INVALID_ARGUMENT, error
        assert all(part in str(error) for part in parts), error


@pytest.mark.parametrize("name", ["a b", "../lora", "lora\n", "ключ", "x" * 129, "lora\x00", "-x"])
def test_odd_names(client: Client, adapters: dict[str, Path], name: str) -> None:
    error = refused(lambda: client.load_adapter(name, str(adapters["lora"]), timeout=10))
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "name"), error
    error = refused(lambda: client.generate(PROMPT, PARAMS, adapters=name, timeout=10))
    assert error.code is Code.INVALID_ARGUMENT, error


def test_an_adapter_that_the_prompt_does_not_invoke(client: Client) -> None:
    """No error: the base answers, and the answer says so."""
    base = client.generate(PROMPT, PARAMS)
    asleep = client.generate(PROMPT, PARAMS, adapters="alora")
    assert asleep.token_ids == base.token_ids
    assert [use.invoked for use in asleep.adapters] == [False]
    awake = client.generate((*PROMPT, *INVOCATION), PARAMS, adapters="alora")
    assert [use.invoked for use in awake.adapters] == [True]
    assert awake.token_ids != client.generate((*PROMPT, *INVOCATION), PARAMS).token_ids


def fuse(directory: Path) -> None:
    """Factors of an embedding that overflow for token 7 alone, whose column is by far not the largest."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "lora_embedding_A" in name:
            tensor[0], tensor[1] = 1e3, 0.0
            tensor[:, 7] = torch.tensor([0.0, 10.0])
        if "lora_embedding_B" in name:
            tensor[:, 0], tensor[:, 1] = tensor[:, 0] * 1e-3, 3e37
        return tensor

    rewrite(directory, change)


def test_an_adapter_that_cannot_but_overflow(client: Client, adapters: dict[str, Path], root: Path) -> None:
    """It is tried at load."""
    directory = root / "allowed" / "overflows"
    shutil.copytree(adapters["lora"], directory)
    rewrite(directory, lambda name, tensor: tensor * 1e19)
    error = refused(lambda: client.load_adapter("bad", str(directory), timeout=20))
    assert error.code is Code.INVALID_ARGUMENT, error
    assert "turns logits non-finite" in str(error), error


def test_logits_that_turn_non_finite_end_that_request_alone(
    client: Client, adapters: dict[str, Path], root: Path
) -> None:
    """What no trial at load can find: one token of the vocabulary brings it out."""
    directory = root / "allowed" / "huge"
    shutil.copytree(adapters["embedding"], directory)
    fuse(directory)
    client.load_adapter("huge", str(directory))
    params = Params(max_tokens=200, ignore_eos=True, token_ids=True)
    alone = {name: client.generate([5, 6, 7], params, adapters=name).token_ids for name in ("", "head")}
    with ThreadPoolExecutor(4) as pool:
        names = ["", "head"] * 2
        neighbours = [pool.submit(client.generate, [5, 6, 7], params, adapters=name) for name in names]
        error = refused(lambda: client.generate([5, 6, 7], params, adapters="huge", timeout=10))
        assert [neighbour.result().token_ids for neighbour in neighbours] == [alone[name] for name in names]
    assert error.code is Code.FAILED_PRECONDITION, error
    assert "logits turned non-finite" in str(error)
    assert "'huge'" in str(error)
    client.unload_adapter("huge")
