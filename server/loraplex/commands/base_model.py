"""From ``--model`` to a model directory on this machine: the demo, a directory, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex.config import ModelConfig
from loraplex.errors import InvalidModel, NotFound

DEMO: Final = "demo"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.gguf", "*.model", "*.txt", "*.jinja")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BaseModelDir:
    """A model directory, the name it is known by, and directories that its adapters come from."""

    model_id: str
    path: Path
    adapter_dirs: tuple[str, ...] = ()


def find_base_model(config: ModelConfig, cache_dir: Path, progress: Progress) -> BaseModelDir:
    """The directory of the base model, downloaded or converted first where needed.

    Raises NotFound or InvalidModel, naming what is missing.
    """
    if config.model == DEMO:
        from loraplex.demo.base import ensure_demo_base
        from loraplex.demo.gallery import ADAPTERS_DIR

        path = ensure_demo_base(cache_dir, lambda done, total: progress("converting demo base", done, total))
        return BaseModelDir(DEMO, path, (str(ADAPTERS_DIR),))
    path = Path(config.model).expanduser()
    if path.is_dir():
        return BaseModelDir(path.resolve().name, _checked(path))
    if path.is_file() and path.suffix == ".gguf":
        return BaseModelDir(path.stem, _of_gguf(path, config.load_format, cache_dir, progress))
    if path.exists() or not _HUB_ID.fullmatch(config.model):
        raise NotFound(f"--model {config.model}: no such directory, and not a hub id such as org/name")
    return BaseModelDir(config.model, _checked(_download(config, cache_dir, progress)))


def _checked(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise InvalidModel(f"model directory {path} has no config.json")
    return path


def _of_gguf(path: Path, load_format: str, cache_dir: Path, progress: Progress) -> Path:
    """The directory that the file converts to, tokenizer included; the file itself when ``--load-format gguf`` asks."""
    if load_format == "gguf":
        return path
    from loraplex.models.gguf_convert import convert_gguf

    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    converted = cache_dir / f"gguf-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return convert_gguf(path, converted, lambda done, total: progress("converting GGUF", done, total))


def _download(config: ModelConfig, cache_dir: Path, progress: Progress) -> Path:
    # Imported late: only a hub id needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    progress(f"downloading {config.model}", 0, 0)
    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision or None,
                cache_dir=cache_dir / "hub",
                allow_patterns=list(_HUB_FILES),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFound(f"--model {config.model}: no such directory, and the hub does not give it: {reason}") from error
