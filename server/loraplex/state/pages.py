"""Who owns which page of the key/value cache: allocation, reference counts, and the prefix index.

Knows page numbers and token ids; knows no tensor. Owned by the scheduler. A page is *free* (blank), *held* (some
sequence reads or writes it) or *cached* (nobody holds it, but the prefix index can still hand it out; reused oldest
first when blanks run out). Page 0 is never handed out: it pads page lists.

The prefix index is exact: a full page is found by its parent page's entry and its own token ids, compared as ids, never
by a hash alone. With the ids stand the marks of the sequence's *lineage* that lie in the page: the adapters that are on
from there. A chain is thus found by exactly the sequences that would compute what it holds.

A model without attention has pages without memory: they are counted all the same, because the index is made of them.
States behind a page are ``state/slots.py``'s, which is told when the index forgets one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex.state.lineage import Lineage, Mark

#: stands for the parent of first pages
_ROOT: Final = 0

_Key = tuple[int, tuple[Mark, ...], tuple[int, ...]]
"""A page's place in the prefix tree: its parent's uid, the marks in it, and its token ids."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A published page. A uid is never used again."""

    uid: int
    page: int
    key: _Key


@dataclass(slots=True)
class Published:
    """How far one owner's pages have been published, so that it goes on from there; a new one for new pages."""

    num_pages: int = 0
    last: _Entry | None = None
    #: the last one that stands for another owner's page of the same tokens: that page may go first
    foreign: _Entry | None = None


class PageAllocator:
    """Pages ``1 .. num_pages-1`` of ``page_size`` tokens each."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_cache: bool = True,
        on_forget: Callable[[int], None] = lambda page: None,
    ) -> None:
        """``on_forget`` is told of each page that the prefix index forgets."""
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"need at least 2 pages of 1 token, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._prefix_cache = prefix_cache
        self._on_forget = on_forget
        self._blank: deque[int] = deque(range(1, num_pages))
        self._refs = [0] * num_pages
        self._entries: dict[_Key, _Entry] = {}
        self._entry_of: dict[int, _Entry] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._last_uid = _ROOT

    @property
    def num_available(self) -> int:
        """Pages that ``take`` could hand out now."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - 1 - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens need."""
        return -(-num_tokens // self.page_size)

    def match(self, lineage: Lineage, token_ids: Sequence[int]) -> list[int]:
        """The cached pages of the longest known prefix, whole pages only, always leaving one token to compute.

        The pages are not held yet: call ``hold`` before anything else can take them.
        """
        if not self._prefix_cache:
            return []
        pages: list[int] = []
        parent, size = _ROOT, self.page_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            entry = self._entries.get(_key(parent, lineage, token_ids, start, start + size))
            if entry is None:
                break
            pages.append(entry.page)
            parent = entry.uid
        return pages

    def num_cached_in(self, pages: Sequence[int]) -> int:
        """How many of ``pages`` are cached and would stop being available when held."""
        return sum(1 for page in pages if self._refs[page] == 0)

    def hold(self, pages: Sequence[int]) -> None:
        """Take a reference on pages that ``match`` found."""
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1

    def take(self, count: int) -> list[int] | None:
        """``count`` pages for one owner, or None when there are not so many. Their old content must be cleared."""
        if count > self.num_available:
            return None
        pages: list[int] = []
        for _ in range(count):
            if self._blank:
                page = self._blank.popleft()
            else:
                page, _nothing = self._cached.popitem(last=False)
                self._forget(page)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def publish(
        self,
        lineage: Lineage,
        token_ids: Sequence[int],
        pages: Sequence[int],
        published: Published | None = None,
        asked: Collection[int] = (),
    ) -> dict[int, int]:
        """Enter into the index every full page of ``pages`` that ``token_ids`` covers; known chains stay as they are.

        Only call this once every one of these tokens has gone into finite logits. ``published``, of a former call with
        the same pages, saves looking at those again. Returns which page of the index is the last of the first n, of
        each n of ``asked`` that this call came past.
        """
        found: dict[int, int] = {}
        if not self._prefix_cache:
            return found
        size = self.page_size
        so_far = published or Published()
        if so_far.foreign is not None and self._entries.get(so_far.foreign.key) is not so_far.foreign:
            so_far.num_pages, so_far.last, so_far.foreign = 0, None, None
        for index in range(so_far.num_pages, min(len(token_ids) // size, len(pages))):
            parent = _ROOT if so_far.last is None else so_far.last.uid
            key = _key(parent, lineage, token_ids, index * size, (index + 1) * size)
            entry = self._entries.get(key)
            if entry is None:
                if pages[index] in self._entry_of:
                    return found  # this page stands elsewhere in the tree: the chain above it was evicted and remade
                self._last_uid += 1
                entry = _Entry(self._last_uid, pages[index], key)
                self._entries[key] = entry
                self._entry_of[pages[index]] = entry
            elif entry.page != pages[index]:
                so_far.foreign = entry
            so_far.num_pages, so_far.last = index + 1, entry
            if so_far.num_pages in asked:
                found[so_far.num_pages] = entry.page
        return found

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference on each; the tail of a chain becomes the first to be reused."""
        for page in reversed(pages):
            refs = self._refs[page]
            assert refs > 0, f"page {page} released more often than it was held"
            self._refs[page] = refs - 1
            if refs == 1:
                if page in self._entry_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def _forget(self, page: int) -> None:
        entry = self._entry_of.pop(page)
        del self._entries[entry.key]
        self._on_forget(page)


def _key(parent: int, lineage: Lineage, token_ids: Sequence[int], start: int, stop: int) -> _Key:
    """The place of the page of tokens ``start:stop``."""
    return parent, lineage.begun(start, stop), tuple(token_ids[start:stop])
