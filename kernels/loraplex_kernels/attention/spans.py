"""What every attention backend checks of a cache's size and a step's spans; knows no layout."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_kernels.attention import SequenceSpan


def check_cache(num_pages: int, page_size: int) -> None:
    """Raise ValueError unless there is at least page 0 and pages hold something."""
    if num_pages < 1 or page_size < 1:
        raise ValueError(f"a cache of {num_pages} pages of {page_size} slots: both must be at least 1")


def check_spans(spans: Sequence[SequenceSpan], *, num_pages: int, page_size: int) -> None:
    """Raise ValueError for a span whose pages do not hold its context, or that names a page it may not have.

    Pages past the context may be page 0: it pads page lists.
    """
    for index, span in enumerate(spans):
        if not 1 <= span.num_queries <= span.context_len:
            raise ValueError(
                f"sequence {index} of the step: {span.num_queries} query rows of a context of {span.context_len}; "
                f"must be between 1 and the context"
            )
        used = span.pages[: -(-span.context_len // page_size)]
        if len(used) * page_size < span.context_len:
            raise ValueError(
                f"sequence {index} of the step: {len(span.pages)} pages of {page_size} slots cannot hold a context of "
                f"{span.context_len}"
            )
        if min(used) < 1 or max(used) >= num_pages:
            raise ValueError(
                f"sequence {index} of the step: pages {min(used)}..{max(used)}, must lie in 1..{num_pages - 1}"
            )
