"""The backends that the attention op's tests are run on, a cache with sequences to run, and the right answers.

A backend that is slow to launch (an interpreted kernel) is tested on every pair of the matrix's values, not on every
combination of all of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.attention.paged_cache import PagedCache
from loraplex_kernels.backend import choose_attention
from tests.ops.lora_subjects import pairwise

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_PAGES = 240
LAYERS = 2
SCALE = 0.3
#: torch's varlen_attn takes no smaller pages
LARGE_PAGE = 256


@dataclass(frozen=True, slots=True)
class Geometry:
    page_size: int
    kv_heads: int
    group: int
    head_dim: int


GEOMETRIES = (Geometry(16, 3, 3, 8), Geometry(1, 1, 1, 5), Geometry(4, 2, 1, 16), Geometry(5, 1, 4, 6))
#: what varlen_attn takes
LARGE_GEOMETRIES = (Geometry(LARGE_PAGE, 2, 4, 64), Geometry(LARGE_PAGE, 3, 1, 8))


@dataclass(frozen=True, slots=True)
class SubjectEntry:
    """A backend on a device."""

    name: str
    device: torch.device = CPU
    #: what this machine lacks for it; None when it can run here
    missing: Callable[[], str | None] = lambda: None
    #: launches are so dear that the matrix must be small
    slow: bool = False
    #: dtypes it is not tested in, and why
    skips: Mapping[torch.dtype, str] = field(default_factory=dict)
    geometries: tuple[Geometry, ...] = GEOMETRIES
    #: for long contexts
    lean: Geometry = Geometry(16, 1, 2, 4)
    #: long enough for several tiles of queries, and for several splits of a context
    prompt: int = 600
    context: int = 2200
    marks: tuple[pytest.MarkDecorator, ...] = ()


def no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "triton compiles for the GPU here; its interpreter is not tested" if torch.cuda.is_available() else None


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device"


def no_varlen() -> str | None:
    """What varlen_attn misses here, as the server would say it."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        choose_attention("varlen", CUDA, page_size=LARGE_PAGE)
    except ValueError as error:
        return str(error)
    return None


CUDA = torch.device("cuda", 0)
ON_GPU = (pytest.mark.gpu,)
SUBJECTS: Mapping[str, SubjectEntry] = {
    "reference": SubjectEntry("reference"),
    "cpu": SubjectEntry("cpu"),
    "triton, interpreted": SubjectEntry(
        "triton",
        missing=no_interpreter,
        slow=True,
        prompt=100,
        context=300,
        skips={torch.bfloat16: "Triton's interpreter gets the product of bf16 tiles wrong; tested on a GPU"},
    ),
    "triton": SubjectEntry("triton", CUDA, no_gpu, geometries=(*GEOMETRIES, *LARGE_GEOMETRIES), marks=ON_GPU),
    "varlen": SubjectEntry(
        "varlen",
        CUDA,
        no_varlen,
        skips={torch.float32: "FlashAttention has no float32"},
        geometries=LARGE_GEOMETRIES,
        lean=LARGE_GEOMETRIES[1],
        marks=ON_GPU,
    ),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One backend, freshly made. Tensors go in and come out on the CPU."""

    backend: AttentionBackend
    dtype: torch.dtype
    entry: SubjectEntry

    @property
    def device(self) -> torch.device:
        return self.entry.device

    @property
    def geometry(self) -> Geometry:
        return self.entry.geometries[0]


def make_subject(name: str) -> Subject:
    """The subject of that name, with a geometry and a dtype it takes; skips the test when this machine lacks it."""
    entry = SUBJECTS[name]
    missing = entry.missing()
    if missing is not None:
        pytest.skip(missing)
    page_size = entry.geometries[0].page_size
    dtype = next(dtype for dtype in DTYPES if dtype not in entry.skips)
    backend = choose_attention(entry.name, entry.device, dtype=dtype, page_size=page_size)
    return Subject(backend, dtype, entry)


def every_subject() -> list[object]:
    """Parameters of the fixture ``attention``."""
    return [pytest.param(name, marks=entry.marks) for name, entry in SUBJECTS.items()]


def subjects_named(*names: str) -> list[object]:
    """Parameters of the fixture ``attention``: these alone."""
    return [pytest.param(name, marks=SUBJECTS[name].marks) for name in names]


def matrix(*axes: Sequence[object]) -> list[object]:
    """Parameters of ``(attention, dtype, geometry, *axes)``: all combinations, or for slow subjects all pairs."""
    params: list[object] = []
    for name, entry in SUBJECTS.items():
        tested = [dtype for dtype in DTYPES if dtype not in entry.skips]
        values = (tested, entry.geometries, *axes)
        rows = pairwise(*values) if entry.slow else list(itertools.product(*values))
        for row in rows:
            made = "-".join([name, *(str(value) for value in row)])
            params.append(pytest.param(name, *row, marks=entry.marks, id=made))
        for dtype, reason in entry.skips.items():
            marks = (*entry.marks, pytest.mark.skip(reason=reason))
            rest = (entry.geometries[0], *(axis[0] for axis in axes))
            params.append(pytest.param(name, dtype, *rest, marks=marks, id=f"{name}-{dtype}"))
    return params


@dataclass
class Story:
    """One sequence with all its tokens made in advance, and how many of them the cache has."""

    pages: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    done: int = 0


@dataclass
class World:
    """A backend's cache, and sequences on shuffled pages."""

    subject: Subject
    geometry: Geometry
    dtype: torch.dtype
    window: int | None = None
    num_pages: int = NUM_PAGES
    seed: int = 11

    def __post_init__(self) -> None:
        geometry = self.geometry
        self.backend = self.subject.backend
        self.cache: KVCache = self.backend.new_cache(
            num_layers=LAYERS,
            num_pages=self.num_pages,
            page_size=geometry.page_size,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            dtype=self.dtype,
            device=self.subject.device,
        )
        self.free = list(range(1, self.num_pages))
        random.Random(3).shuffle(self.free)
        self.generator = torch.Generator().manual_seed(self.seed)

    def add(self, length: int) -> Story:
        """A sequence of ``length`` tokens, none of which has been run."""
        geometry = self.geometry
        pages = [self.free.pop() for _ in range(-(-length // geometry.page_size))]
        self.cache.zero_pages(pages)
        heads = (geometry.kv_heads * geometry.group, geometry.kv_heads, geometry.kv_heads)
        q, k, v = (
            torch.randn(length, count, geometry.head_dim, generator=self.generator).to(self.dtype) for count in heads
        )
        return Story(pages, q, k, v)

    def fill(self, seq: Story, count: int) -> None:
        """Put the first ``count`` tokens of ``seq`` where step would, into every layer of a paged cache: in an
        interpreter attention to them takes most of a test's time."""
        assert isinstance(self.cache, PagedCache)
        size = self.geometry.page_size
        for sides, rows in ((self.cache.keys, seq.k), (self.cache.values, seq.v)):
            for side, position in itertools.product(sides, range(count)):
                side[seq.pages[position // size], :, position % size] = rows[position].to(self.subject.device)
        seq.done = count

    def rows(self, parts: Sequence[tuple[Story, slice]], total: int | None = None) -> list[torch.Tensor]:
        """q, k and v of a step on the device, as views of one tensor; rows past the parts' are NaN."""
        geometry = self.geometry
        heads = [geometry.kv_heads * geometry.group, geometry.kv_heads, geometry.kv_heads]
        count = sum(rows.stop - rows.start for _, rows in parts)
        qkv = torch.full((total or count, sum(heads), geometry.head_dim), float("nan"), dtype=self.dtype)
        for name, view in zip("qkv", qkv.split(heads, dim=1), strict=True):
            for (seq, rows), place in zip(parts, _places(parts), strict=True):
                view[place] = getattr(seq, name)[rows]
        return list(qkv.to(self.subject.device).split(heads, dim=1))

    def step(self, chunks: Sequence[tuple[Story, int]], layer: int = 1) -> list[torch.Tensor]:
        """Run ``count`` further tokens of each sequence; the rows of out per sequence."""
        parts = [(seq, slice(seq.done, seq.done + count)) for seq, count in chunks]
        out = self.backend.attend(
            *self.rows(parts),
            layer=layer,
            cache=self.cache,
            plan=self.backend.prepare(spans_of(parts), self.cache),
            scale=SCALE,
            window=self.window,
        )
        for seq, rows in parts:
            seq.done = rows.stop
        return list(out.cpu().split([count for _, count in chunks]))


def spans_of(parts: Sequence[tuple[Story, slice]]) -> list[SequenceSpan]:
    """The spans of a step that runs these rows of these sequences."""
    return [SequenceSpan(rows.stop - rows.start, rows.stop, seq.pages) for seq, rows in parts]


def _places(parts: Sequence[tuple[Story, slice]]) -> list[slice]:
    stops = list(itertools.accumulate(rows.stop - rows.start for _, rows in parts))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def dense(seq: Story, start: int, stop: int, window: int | None) -> torch.Tensor:
    """Rows ``start:stop`` in float64 by torch's own attention over the whole context."""
    group = seq.q.shape[1] // seq.k.shape[1]
    q = seq.q[start:stop].double().transpose(0, 1)
    k, v = (side[:stop].double().transpose(0, 1).repeat_interleave(group, 0) for side in (seq.k, seq.v))
    query, key = torch.arange(start, stop)[:, None], torch.arange(stop)[None, :]
    seen = (key <= query) & (key > query - (window or stop))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)
    return out.transpose(0, 1).flatten(1)
