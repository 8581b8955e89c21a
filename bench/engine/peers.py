"""transformers.generate and PEFT's mixed batch, as their documentation has them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.engine.workload import Job

PAD = 0


class TransformersSide:
    """The base model through ``generate``."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()

    def run(self, job: Job) -> list[list[int]]:
        return generate(self._model, job)


class PeftSide:
    """The base model with adapters, mixed by row with ``adapter_names``."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path], dtype: torch.dtype) -> None:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        (first, first_dir), *rest = adapters.items()
        # autocast_adapter_dtype would hold the factors in float32 beside a bfloat16 base
        self._model = PeftModel.from_pretrained(base, first_dir, adapter_name=first, autocast_adapter_dtype=False)
        for name, directory in rest:
            self._model.load_adapter(directory, adapter_name=name, autocast_adapter_dtype=False)
        self._model.eval()

    def run(self, job: Job) -> list[list[int]]:
        return generate(self._model, job, adapter_names=[row.adapter or "__base__" for row in job.rows])

    def run_alone(self, job: Job) -> list[list[int]]:
        """Every row with the first adapter, for kinds that PEFT does not mix by row."""
        return generate(self._model, job)


def generate(model: torch.nn.Module, job: Job, **options: object) -> list[list[int]]:
    """Greedy, no end token, left-padded."""
    width = max(len(row.prompt) for row in job.rows)
    ids = torch.full((len(job.rows), width), PAD)  # [N, P]
    mask = torch.zeros_like(ids)
    for index, row in enumerate(job.rows):
        ids[index, width - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[index, width - len(row.prompt) :] = 1
    config = GenerationConfig(do_sample=False, max_new_tokens=job.num_tokens, pad_token_id=PAD, eos_token_id=None)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return [[int(token) for token in row] for row in out[:, width:]]
