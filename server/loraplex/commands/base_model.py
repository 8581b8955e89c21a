"""From ``--model`` to a model directory on this machine: the demo, a directory, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from loraplex.config import ModelConfig
from loraplex.errors import ConversionFailed, InvalidModel, NotFound

_log = logging.getLogger(__name__)

DEMO: Final = "demo"
GGUF: Final = "gguf"
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
        from loraplex.demo.gallery import ADAPTERS_DIR

        return BaseModelDir(DEMO, _demo(config.load_format, cache_dir, progress), (str(ADAPTERS_DIR),))
    path = Path(config.model).expanduser()
    if path.is_dir():
        return BaseModelDir(path.resolve().name, _checked(path))
    if path.is_file() and path.suffix == ".gguf":
        return BaseModelDir(path.stem, _of_gguf(path, config.load_format, cache_dir, progress))
    if path.exists() or not _HUB_ID.fullmatch(config.model):
        raise NotFound(f"--model {config.model}: no such directory, and not a hub id such as org/name")
    return BaseModelDir(config.model, _checked(_download(config, cache_dir, progress)))


def _demo(load_format: str, cache_dir: Path, progress: Progress) -> Path:
    """The demo's directory: converted, or with ``--load-format gguf`` the file that its package ships."""
    from loraplex.demo.base import ensure_demo_base, ensure_demo_gguf

    if load_format == GGUF:
        progress("reading GGUF", 0, 0)
        return ensure_demo_gguf(cache_dir)
    return ensure_demo_base(cache_dir, lambda done, total: progress("converting demo base", done, total))


def _checked(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise InvalidModel(f"model directory {path} has no config.json")
    return path


def _of_gguf(path: Path, load_format: str, cache_dir: Path, progress: Progress) -> Path:
    """The directory that the file converts to, or is linked from where ``--load-format gguf`` asks for its own weights;
    tokenizer included."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    if load_format != GGUF:
        from loraplex.models.gguf_convert import convert_gguf

        return convert_gguf(path, cache_dir / f"gguf-{key}", partial(progress, "converting GGUF"))
    linked = cache_dir / f"gguf-linked-{key}"
    if linked.is_dir():
        return linked
    from loraplex.models.gguf_convert import link_gguf

    progress("reading GGUF", 0, 0)
    try:
        return link_gguf(path, linked)
    except ConversionFailed as error:
        # its weights may do all the same
        _log.warning("%s is served without its tokenizer, by token ids alone: %s", path, error)
        return path


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
