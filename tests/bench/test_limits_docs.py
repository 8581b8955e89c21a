"""What docs/ shows of the byte model is what the model says now."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bench.limits.__main__ import JSON_NAME
from bench.limits.grid import as_json, count, digest
from bench.limits.hardware import H200
from bench.limits.markdown import filled
from bench.limits.plots import DIGEST_FIELD, FIGURES, draw
from bench.limits.shapes import LLAMA_8B

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "run python -m bench.limits --out docs/limits --page docs/GPU.md"


def test_the_numbers_are_fresh() -> None:
    assert (DOCS / "limits" / JSON_NAME).read_text() == as_json(count(LLAMA_8B, H200)), AGAIN


@pytest.mark.parametrize("name", FIGURES)
def test_the_figures_show_these_numbers(name: str) -> None:
    with Image.open(DOCS / "limits" / name) as image:
        assert image.info[DIGEST_FIELD] == digest(as_json(count(LLAMA_8B, H200))), AGAIN
    assert f"limits/{name}" in (DOCS / "GPU.md").read_text()


def test_the_page_holds_the_tables() -> None:
    page = (DOCS / "GPU.md").read_text()
    assert filled(page, count(LLAMA_8B, H200)) == page, AGAIN


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no <!-- table: bytes --> \.\.\. <!-- end: bytes -->"):
        filled("# A page\n", count(LLAMA_8B, H200))


def test_figures_are_drawn(tmp_path: Path) -> None:
    assert draw(count(LLAMA_8B, H200), "a digest", tmp_path) == list(FIGURES)
    for name in FIGURES:
        with Image.open(tmp_path / name) as image:
            assert image.info[DIGEST_FIELD] == "a digest"
            assert image.width > 1000
