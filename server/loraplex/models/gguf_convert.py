"""GGUF file -> checkpoint directory in the Hugging Face layout, its weights converted or the file itself, linked.

Owns the tensor names, the rotary un-permutation and the atomic publication of the directory. Knows nothing of
which model is converted, where it came from or what reads it afterwards; tokens are `gguf_tokenizer`'s concern.

The directory appears under its final name in one rename, after every file in it was written and synced. Until
then it is `<name>.partial`, which the next attempt removes, so an interrupted conversion is never loadable.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from loraplex.errors import ConversionFailed, NotFound
from loraplex.models.gguf_tokenizer import TokenizerFacts, convert_tokenizer

Progress = Callable[[int, int], None]
"""Called as `progress(num_done, num_total)`, in tensors, first with `num_done == 0`."""


class QuantizedTensor(Protocol):
    """The part of `gguf.ReaderTensor` that conversion reads; `shape` is innermost first."""

    name: str
    shape: np.ndarray
    data: np.ndarray
    tensor_type: gguf.GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """What differs between the decoder families: names in the file, names in the checkpoint, rotary layout."""

    config_class: type[PreTrainedConfig]
    causal_lm: str
    extra_block_names: Mapping[str, str]
    interleaved_rope: bool


_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_QKV_BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_QK_NORMS = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(LlamaConfig, "LlamaForCausalLM", {}, interleaved_rope=True),
    "qwen2": GgufArchitecture(Qwen2Config, "Qwen2ForCausalLM", _QKV_BIASES, interleaved_rope=False),
    "qwen3": GgufArchitecture(Qwen3Config, "Qwen3ForCausalLM", _QK_NORMS, interleaved_rope=False),
}


def convert_gguf(gguf_path: Path, out_dir: Path, progress: Progress | None = None) -> Path:
    """Write `out_dir` from `gguf_path` and return `out_dir`; an existing `out_dir` is returned untouched.

    Weights are dequantized to float32 and rounded to bfloat16 one tensor at a time: peak memory is one tensor.
    Two processes may call this at once: the second waits and finds the first one's directory.

    Raises:
        NotFound: `gguf_path` is not a file.
        ConversionFailed: not a GGUF file, an architecture, tensor or tokenizer we do not know, a missing tensor,
            or the disk refused a write. `out_dir` does not exist then.
    """

    def write(partial: Path) -> None:
        checkpoint = open_gguf(gguf_path)
        _write_text(checkpoint, gguf_path, partial)
        _write_weights(checkpoint, partial / "model.safetensors", progress or _no_progress)

    return _publish(gguf_path, out_dir, write)


def link_gguf(gguf_path: Path, out_dir: Path) -> Path:
    """Write `out_dir` with the file itself as its weights, a link, beside tokenizer and configuration. No weight is
    read. Otherwise as `convert_gguf`."""

    def write(partial: Path) -> None:
        _write_text(open_gguf(gguf_path), gguf_path, partial)
        (partial / "model.gguf").symlink_to(gguf_path.resolve())

    return _publish(gguf_path, out_dir, write)


def _publish(gguf_path: Path, out_dir: Path, write: Callable[[Path], None]) -> Path:
    if out_dir.is_dir():
        return out_dir
    if not gguf_path.is_file():
        raise NotFound(f"GGUF file {str(gguf_path)!r} does not exist")
    partial = out_dir.with_name(out_dir.name + ".partial")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out_dir.with_name(out_dir.name + ".lock")):
            if out_dir.is_dir():
                return out_dir
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
                partial.rename(out_dir)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConversionFailed(f"cannot write {str(out_dir)!r} from {gguf_path.name!r}: {error}") from error
    return out_dir


def _no_progress(num_done: int, num_total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class GgufCheckpoint:
    """An open GGUF file under checkpoint names: what `convert_gguf` writes out and the GGUF reader reads directly."""

    config: PreTrainedConfig
    metadata: GgufMetadata
    interleaved_rope: bool
    tensors: Mapping[str, QuantizedTensor]
    """Checkpoint name -> tensor, in the file's order."""

    def weight(self, name: str) -> np.ndarray:
        """The tensor in float32, rotary rows in the checkpoint's order; raises ConversionFailed for unknown types."""
        return self._in_order(name, _dequantize(self.tensors[name]))

    def blocks(self, name: str) -> np.ndarray:
        """The rows of a quantized matrix as the file's bytes, uint8 [out, bytes], rotary rows in the checkpoint's
        order; a view of the file where these are the same."""
        return self._in_order(name, self.tensors[name].data)

    def kind(self, name: str) -> str:
        """The tensor's type, by the gguf library's name: Q4_1."""
        kind: str = self.tensors[name].tensor_type.name
        return kind

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(_shape(self.tensors[name]))

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        heads = {"q_proj.weight": self.config.num_attention_heads, "k_proj.weight": self.config.num_key_value_heads}
        head_count = heads.get(".".join(name.split(".")[-2:]))
        if self.interleaved_rope and head_count is not None:
            return _halves_from_interleaved(rows, head_count)
        return rows


def open_gguf(gguf_path: Path) -> GgufCheckpoint:
    """Read the header and check that the tensors are exactly those of the family; maps the data, reads none.

    Raises ConversionFailed naming the file, and the key or tensor that is unknown, missing or misshapen.
    """
    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError) as error:
        raise ConversionFailed(f"{gguf_path.name!r} is not a readable GGUF file: {error}") from error
    metadata = GgufMetadata(reader, gguf_path.name)
    architecture = metadata.architecture()
    config = _config(metadata, architecture, {tensor.name: tensor.shape for tensor in reader.tensors})
    names = _checkpoint_names(reader, architecture, config, gguf_path.name)
    tensors = {names[tensor.name]: tensor for tensor in reader.tensors}
    return GgufCheckpoint(config, metadata, architecture.interleaved_rope, tensors)


def _write_text(checkpoint: GgufCheckpoint, gguf_path: Path, out_dir: Path) -> None:
    config = checkpoint.config
    config.save_pretrained(out_dir)
    convert_tokenizer(gguf_path, checkpoint.metadata.tokenizer_facts(), out_dir)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(out_dir)


def _write_weights(checkpoint: GgufCheckpoint, path: Path, progress: Progress) -> None:
    num_total = len(checkpoint.tensors)
    with path.open("wb") as file:
        file.write(_safetensors_header(checkpoint.tensors))
        progress(0, num_total)
        for num_done, name in enumerate(checkpoint.tensors, start=1):
            file.write(_bfloat16_bytes(checkpoint.weight(name)))
            progress(num_done, num_total)
        file.flush()
        os.fsync(file.fileno())


class GgufMetadata:
    """Typed reads of a GGUF file's key-value section; a missing or mistyped key is an error naming it."""

    def __init__(self, reader: gguf.GGUFReader, file_name: str) -> None:
        self._fields = reader.fields
        self.file_name = file_name
        self._prefix = ""

    def architecture(self) -> GgufArchitecture:
        """Return the family the file declares, and read `{arch}.` keys under its prefix from now on."""
        name = self.text("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConversionFailed(f"{self.file_name!r}: architecture {name!r} is unknown; known are {known}")
        self._prefix = name
        return ARCHITECTURES[name]

    def text(self, key: str) -> str:
        value = self._value(key, None)
        if not isinstance(value, str):
            raise ConversionFailed(f"{self.file_name!r}: key {key!r} is {value!r}, expected a string")
        return value

    def tokenizer_facts(self) -> TokenizerFacts:
        pre = self.text("tokenizer.ggml.pre")
        add_bos = self._fields.get("tokenizer.ggml.add_bos_token")
        return TokenizerFacts(
            model=self.text("tokenizer.ggml.model"),
            pre=pre,
            # llama.cpp's default where the file is silent (llama_vocab::impl::load).
            add_bos=pre == "llama-bpe" if add_bos is None else bool(add_bos.contents()),
            context_length=self.integer("context_length"),
        )

    def token_id(self, role: str) -> int | None:
        field = self._fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if field is None else int(field.contents())

    def number(self, key: str, default: float | None = None) -> float:
        """Return `{arch}.{key}`, float32 values at their shortest decimal form (1e-05, not 9.99999974e-06)."""
        value = self._value(f"{self._prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConversionFailed(f"{self.file_name!r}: key '{self._prefix}.{key}' is {value!r}, expected a number")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def refuse(self, key: str, allowed: tuple[object, ...]) -> None:
        """Raise unless `{arch}.{key}` is absent or one of `allowed`."""
        field = self._fields.get(f"{self._prefix}.{key}")
        if field is not None and field.contents() not in allowed:
            raise ConversionFailed(
                f"{self.file_name!r}: '{self._prefix}.{key}' is {field.contents()!r}; only {allowed} is supported"
            )

    def _value(self, key: str, default: object) -> object:
        field = self._fields.get(key)
        if field is None and default is None:
            raise ConversionFailed(f"{self.file_name!r}: key {key!r} is missing")
        return default if field is None else field.contents()


def _config(
    metadata: GgufMetadata, architecture: GgufArchitecture, shapes: Mapping[str, np.ndarray]
) -> PreTrainedConfig:
    if "token_embd.weight" not in shapes:
        raise ConversionFailed(f"{metadata.file_name!r}: tensor 'token_embd.weight' is missing")
    metadata.refuse("expert_count", (0,))
    metadata.refuse("rope.scaling.type", ("none",))
    num_heads = metadata.integer("attention.head_count")
    hidden_size = metadata.integer("embedding_length")
    return architecture.config_class(
        architectures=[architecture.causal_lm],
        dtype="bfloat16",
        hidden_size=hidden_size,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_hidden_layers=metadata.integer("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=metadata.integer("attention.head_count_kv", num_heads),
        head_dim=metadata.integer("attention.key_length", hidden_size // num_heads),
        max_position_embeddings=metadata.integer("context_length"),
        rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)},
        vocab_size=int(shapes["token_embd.weight"][1]),
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=metadata.token_id("bos"),
        eos_token_id=metadata.token_id("eos"),
        pad_token_id=metadata.token_id("padding"),
    )


def _checkpoint_names(
    reader: gguf.GGUFReader, architecture: GgufArchitecture, config: PreTrainedConfig, file_name: str
) -> dict[str, str]:
    """Map every tensor name of the file to its checkpoint name; the two sets must match exactly."""
    expected = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        expected["output.weight"] = "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        for theirs, ours in (_BLOCK_NAMES | dict(architecture.extra_block_names)).items():
            expected[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert set(shapes) == set(expected.values())
    found = {tensor.name: _shape(tensor) for tensor in reader.tensors}
    for theirs, ours in expected.items():
        if theirs not in found:
            raise ConversionFailed(f"{file_name!r}: tensor {theirs!r} is missing")
        if found[theirs] != shapes[ours]:
            raise ConversionFailed(
                f"{file_name!r}: tensor {theirs!r} has shape {found[theirs]}, expected {shapes[ours]}"
            )
    for theirs in found:
        if theirs not in expected:
            raise ConversionFailed(f"{file_name!r}: tensor {theirs!r} has no place in {architecture.causal_lm}")
    return expected


def _safetensors_header(tensors: Mapping[str, QuantizedTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, shape, start, end in _layout(tensors):
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(tensors: Mapping[str, QuantizedTensor]) -> Iterator[tuple[str, list[int], int, int]]:
    start = 0
    for name, tensor in tensors.items():
        shape = _shape(tensor)
        end = start + 2 * int(np.prod(shape))
        yield name, shape, start, end
        start = end


def _shape(tensor: QuantizedTensor) -> list[int]:
    return [int(size) for size in reversed(tensor.shape)]


def _halves_from_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order (`permute` in convert_hf_to_gguf.py): pairs (2i, 2i+1) back to (i, i + d/2).

    weight: [num_heads * d, in], numbers or bytes of blocks -> the same shape.
    """
    rows = weight.reshape(num_heads, -1, 2, weight.shape[1])  # [heads, d/2, 2, in]
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _dequantize(tensor: QuantizedTensor) -> np.ndarray:
    try:
        weight: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConversionFailed(f"tensor {tensor.name!r} has unsupported type {tensor.tensor_type.name}") from error
    return weight


def _bfloat16_bytes(weight: np.ndarray) -> bytes:
    rounded = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().tobytes()
