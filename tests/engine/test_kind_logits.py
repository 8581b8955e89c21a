"""Every adapter kind in bfloat16: logits as near PEFT's in float32 as the table of tolerances says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from loraplex.types import OutputOptions
from loraplex_kernels.testing import TOLERANCES
from tests.engines import local_engine
from tests.kind_matrix import KindMatrix
from tests.tiny import LAYERS, VOCAB_SIZE

ALL_LOGPROBS = OutputOptions(logprobs=20, prompt_logprobs=True)


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("qwen3", True)], ids=["llama-untied", "qwen3-tied"])
def test_all_kinds_in_bfloat16(tmp_path: Path, arch: str, tied: bool) -> None:
    """All kinds in one batch of bfloat16, against PEFT in float32 on the same weights.

    The tolerance table allows an op about eight roundings; a layer of a model is as many, and what is before and
    behind the layers, so each adds its share. (PEFT in bfloat16 is no nearer to PEFT in float32.)
    """
    matrix = KindMatrix(tmp_path, arch, tied=tied, gentle=True)
    engine = local_engine(
        matrix.base_dir,
        adapter_dirs=(tmp_path,),
        dtype="bfloat16",
        max_num_batched_tokens=32,
        max_num_seqs=24,
        kv_page_size=4,
    )
    names = ("", *matrix.names)
    for name in matrix.names:
        engine.load_adapter(name, str(matrix.adapter(name)))
    requests = [msgspec.structs.replace(matrix.long_request(name), output=ALL_LOGPROBS) for name in names]
    far: dict[str, float] = {}
    weak: dict[str, float] = {}
    for name, generation in zip(names, engine.generate(requests), strict=True):
        assert generation.failure is None
        logits = matrix.oracle(name).prompt_rows(generation.request.prompt_token_ids)
        base = matrix.oracle("").prompt_rows([min(t, VOCAB_SIZE - 1) for t in generation.request.prompt_token_ids])
        tolerance = TOLERANCES[torch.bfloat16]
        allowed = (LAYERS + 1) * (tolerance.absolute + tolerance.relative * float(logits.abs().max()))
        expected = logits.log_softmax(-1)
        errors = [
            abs(candidate.logprob - float(expected[row, candidate.token_id]))
            for row, logprob in enumerate(generation.prompt_logprobs[-len(expected) + 1 :])
            for candidate in (logprob, *logprob.top)
        ]
        effect = float((logits[:, :VOCAB_SIZE] - base).abs().max())
        if max(errors) > allowed:
            far[name] = max(errors) / allowed
        if name and effect < 2 * allowed:
            weak[name] = effect / allowed
    assert not far
    assert not weak, "a wrong adapter would not be seen"
