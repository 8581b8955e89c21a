"""Quantized weights and their adapters in one launch, through the whole engine under graphs, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.types import AdapterRef, OnConflict, Request, StopRule
from loraplex_kernels.backend import choose_lora, choose_quant
from loraplex_kernels.quant.device import DeviceMatrix
from tests.engines import local_engine, make_adapters
from tests.fakes_graphs import RerunCapture
from tests.tiny import prompt, tiny_checkpoint

STOP = StopRule(max_tokens=2, ignore_eos=True)
NAMES = (None, "all", "stabilized")


@pytest.fixture(autouse=True)
def triton_runs_here() -> None:
    try:
        choose_quant("triton", torch.device("cpu"))
        choose_lora("triton-fused", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


def requests(names: tuple[str | None, ...]) -> list[Request]:
    return [
        Request(f"r{i}", prompt(3 + i, seed=i), adapters=(AdapterRef(name),) if name else (), stop=STOP)
        for i, name in enumerate(names)
    ]


def test_tokens_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are loaded and replaced after the capture."""
    joined: list[int] = []
    whole = DeviceMatrix.multiply_joined

    def counted(matrix: DeviceMatrix, scaled: torch.Tensor, *rest: object) -> torch.Tensor:
        joined.append(len(scaled))
        return whole(matrix, scaled, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceMatrix, "multiply_joined", counted)
    base = tiny_checkpoint(tmp_path, "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    adapters = make_adapters(base, tmp_path / "adapters", ("all", "attention", "stabilized"))
    got = {}
    for lora, quant in (("reference", "reference"), ("triton-fused", "triton")):
        engine = local_engine(
            base,
            adapter_dirs=(tmp_path,),
            lora_backend=lora,
            quant_backend=quant,
            attention_backend="triton" if quant == "triton" else "reference",
            quantization="nf4",
            graphs="on" if quant == "triton" else "off",
            capture=RerunCapture(),
            max_num_seqs=3,
            max_num_batched_tokens=16,
        )
        for name in ("all", "stabilized"):
            engine.load_adapter(name, str(adapters[name]))
        tokens = [generation.token_ids for generation in engine.generate(requests(NAMES))]
        engine.load_adapter("all", str(adapters["attention"]), OnConflict.REPLACE)
        got[quant] = tokens, engine.generate(requests((None, "all")))[1].token_ids
    assert got["triton"] == got["reference"]
    assert set(joined) >= {3}, "decode steps of three rows"
