"""The matrices of a merged checkpoint that are written quantized: which they are, as what tensors, and what that loses.

Planned before there are values, so that sizes which a form cannot have are refused first. A matrix is quantized whole,
whatever the base is cut into and stored as; beside it no more than its codes and some rows in float32 are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch

from loraplex.adapters.exporting.shards import TensorPlan
from loraplex.errors import InvalidRequest
from loraplex.models.sites import Site, SiteKind
from loraplex.quant.base import Matrix
from loraplex.quant.written import WriteFormat
from loraplex_kernels.quant.stored import ROW_STEP, StoredMatrix, decode

#: elements of a matrix that are decoded at once
_CHUNK_ELEMENTS: Final = 1 << 20


class Requantized:
    """The matrices of ``sites`` that ``form`` is for. Owned by the export that writes them: it keeps what each lost."""

    def __init__(self, form: WriteFormat, sites: Iterable[Site], dtype: torch.dtype, held: frozenset[str]) -> None:
        """``dtype``: of the matrices where they are dense. ``held``: modules that the base has in this form itself;
        where it has any, all others stay dense, as they are in the base, else the head and what is no matrix.

        Raises InvalidRequest: a matrix has sizes that the form has no blocks for.
        """
        linear = [site for site in sites if site.kind is SiteKind.LINEAR]
        chosen = [site for site in linear if not site.is_head and (not held or site.name in held)]
        self._form = form
        self._dtype = dtype
        self._matrices = {site.name: Matrix(site.name, site.out_features, site.in_features) for site in chosen}
        self._errors: dict[str, float] = {}
        self._dense = [site.name for site in linear if site.name not in self._matrices]
        for matrix in self._matrices.values():
            if reason := form.quantizer.why_not(matrix):
                raise InvalidRequest(f"quantization: {reason}; leave it out to export dense", field="quantization")

    def __contains__(self, site: Site) -> bool:
        return site.name in self._matrices

    def config(self) -> dict[str, object]:
        """The ``quantization_config`` of the checkpoint."""
        return self._form.config(self._dtype, self._dense)

    def plans(self, site: Site) -> tuple[TensorPlan, ...]:
        """The tensors that stand for the weight of one of its sites."""
        blank = self._form.blank(self._matrices[site.name], self._dtype)
        return tuple(TensorPlan(key, tuple(tensor.shape), tensor.dtype) for key, tensor in blank.items())

    def tensors(self, site: Site, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The same with the values that ``weight`` has. Raises InvalidModel: one is not finite."""
        matrix = self._matrices[site.name]
        stored = self._form.quantizer.quantized(matrix.key, weight)
        self._errors[site.name] = relative_error(stored, weight)
        return self._form.tensors(matrix, stored)

    def largest_error(self) -> tuple[str, float]:
        """The site that has lost most so far, and its ``relative_error``."""
        return max(self._errors.items(), key=lambda item: item[1])

    def mean_error(self) -> float:
        """Of the sites so far."""
        return sum(self._errors.values()) / len(self._errors)


def relative_error(stored: StoredMatrix, exact: torch.Tensor) -> float:
    """``||stored - exact|| / ||exact||`` in the Frobenius norm, for ``exact`` ``[out, in]``; 0 where both are 0."""
    lost = size = 0.0
    rows, columns = stored.shape
    step = max(_CHUNK_ELEMENTS // columns // ROW_STEP, 1) * ROW_STEP
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = exact[start:stop].float()
        lost += _square(decode(stored.rows(start, stop), torch.float32) - part)
        size += _square(part)
    return (lost / size) ** 0.5 if size else 0.0


def _square(part: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
