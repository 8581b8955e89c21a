"""Whether ranks can share a quantized model: every cut must fall between two groups of its format."""

from __future__ import annotations

from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site, SiteKind
from loraplex.models.spec import DecoderSpec
from loraplex.parallel.shard import Runs, length
from loraplex.quant.base import Grain, Matrix, QuantFormat

#: group sizes that a refusal looks at for some that would do
_LARGEST_GROUP: Final = 64


def check_grains(size: int, spec: DecoderSpec, quant_format: QuantFormat) -> None:
    """Raises UnsupportedFeature: a rank's part of a matrix would begin within a group; names the matrix, and the sizes
    that would do. ``size`` fits the model's own cuts."""
    sites = {site.name: site for site in spec.sites()}
    cuts = [(sites[name], matrix, quant_format.grain(matrix)) for name, matrix in spec.matrices().items()]
    for site, matrix, grain in cuts:
        split = _split(site, matrix, grain, size)
        if split:
            fitting = [
                str(n)
                for n in range(1, _LARGEST_GROUP + 1)
                if all(one[0].cut.fits(n) and not _split(*one, n) for one in cuts)
            ]
            raise UnsupportedFeature(
                f"tensor_parallel_size {size} cuts {matrix.name} {split}, which {grain.why} of "
                f"{quant_format.name} does not allow; sizes that fit are {', '.join(fitting)}",
                field="tensor_parallel_size",
            )


def _split(site: Site, matrix: Matrix, grain: Grain, size: int) -> str:
    """Where a rank's part would begin or end within a group, in words; nothing, where none does."""
    for rank in range(size):
        part = site.part(rank, size)
        # seen from tokens to features, an embedding's matrix lies on its side
        turned = site.kind is SiteKind.EMBEDDING
        rows, cols = ((part.cols,), part.rows) if turned else (part.rows, (part.cols,))
        found = _border(rows, matrix.out_features, grain.rows, "row") or _border(
            cols, matrix.in_features, grain.cols, "column"
        )
        if found:
            return found
    return ""


def _border(runs: Runs, whole: int, grain: int, what: str) -> str:
    borders = [border for run in runs for border in (run.start, run.stop)]
    wrong = [border for border in borders if border % grain and border != whole]
    if not wrong:
        return ""
    return f"into {length(runs)} {what}s each" if len(runs) == 1 else f"at {what} {wrong[0]}"
