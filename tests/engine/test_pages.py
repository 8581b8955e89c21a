"""The page allocator: references, reuse order, and a prefix index that is never wrong."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.state.lineage import Lineage
from loraplex.state.pages import PageAllocator, Published

BASE = Lineage()


def test_page_zero_is_never_handed_out() -> None:
    pages = PageAllocator(5, 4)
    assert sorted(pages.take(4) or []) == [1, 2, 3, 4]
    assert pages.take(1) is None


def test_match_leaves_one_token_to_compute() -> None:
    pages = PageAllocator(8, 4)
    held = pages.take(2) or []
    pages.publish(BASE, list(range(8)), held)
    pages.release(held)
    assert pages.match(BASE, list(range(8))) == held[:1]
    assert pages.match(BASE, list(range(9))) == held


def test_lineage_and_tokens_both_count() -> None:
    pages = PageAllocator(8, 2)
    held = pages.take(2) or []
    a = Lineage.of(("a", 1.0))
    pages.publish(a, [1, 2, 3, 4], held)
    assert pages.match(Lineage.of(("b", 1.0)), [1, 2, 3, 4, 5]) == []
    assert pages.match(Lineage.of(("a", 0.5)), [1, 2, 3, 4, 5]) == []
    assert pages.match(BASE, [1, 2, 3, 4, 5]) == []
    assert pages.match(a, [1, 2, 9, 4, 5]) == held[:1]
    assert pages.match(a, [9, 2, 3, 4, 5]) == []


def test_pages_are_shared_up_to_the_first_mark_that_differs() -> None:
    pages = PageAllocator(16, 2)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    base = pages.take(4) or []
    pages.publish(BASE, tokens, base)
    assert pages.match(Lineage(((4, "a"),)), [*tokens, 9]) == base[:2], "on from the third page's first token"
    assert pages.match(Lineage(((3, "a"),)), [*tokens, 9]) == base[:1], "on from within the second page"
    own = pages.take(2) or []
    pages.publish(Lineage(((4, "a"),)), tokens, base[:2] + own)
    assert pages.match(Lineage(((4, "a"),)), [*tokens, 9]) == base[:2] + own
    assert pages.match(Lineage(((4, "b"),)), [*tokens, 9]) == base[:2], "another adapter"
    assert pages.match(Lineage(((5, "a"),)), [*tokens, 9]) == base[:2], "the same one, on from a token later"
    assert pages.match(Lineage(((4, "a"), (6, "b"))), [*tokens, 9]) == [*base[:2], own[0]], "and another after it"
    assert pages.match(Lineage(((8, "a"),)), [*tokens, 9]) == base, "on from the token after the last full page"
    assert pages.match(BASE, [*tokens, 9]) == base


def test_tail_of_a_chain_is_reused_first() -> None:
    pages = PageAllocator(4, 1)
    held = pages.take(3) or []
    pages.publish(BASE, [7, 8, 9], held)
    pages.release(held)
    assert pages.take(1) == [held[2]]
    assert pages.match(BASE, [7, 8, 9, 9]) == held[:2]


def test_prefix_cache_off_finds_nothing() -> None:
    pages = PageAllocator(4, 1, prefix_cache=False)
    held = pages.take(2) or []
    pages.publish(BASE, [1, 2], held)
    pages.release(held)
    assert pages.match(BASE, [1, 2, 3]) == []
    assert pages.num_cached == 0


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (4, 0)])
def test_sizes_are_checked(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(num_pages, page_size)


#: at most one mark for each of two adapters
LINEAGES = st.dictionaries(st.sampled_from("ab"), st.integers(0, 9), max_size=2).map(
    lambda starts: Lineage(tuple((start, key) for key, start in sorted(starts.items())))
)
Content = tuple[tuple[tuple[int, Hashable], ...], tuple[int, ...]]


class AllocatorMachine(RuleBasedStateMachine):
    """Owners take, share, publish and release in any order. The content of a page is modelled as what it is computed
    from: the tokens up to its end, and the marks up to there."""

    NUM_PAGES, PAGE_SIZE = 9, 2

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(self.NUM_PAGES, self.PAGE_SIZE)
        self.owners: list[tuple[Lineage, list[int], list[int]]] = []
        self.content: dict[int, Content] = {}

    def computed_from(self, lineage: Lineage, tokens: list[int], index: int) -> Content:
        end = (index + 1) * self.PAGE_SIZE
        return tuple(mark for mark in lineage.marks if mark[0] < end), tuple(tokens[:end])

    @rule(lineage=LINEAGES, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def begin(self, lineage: Lineage, tokens: list[int]) -> None:
        shared = self.pages.match(lineage, tokens)
        for index, page in enumerate(shared):
            assert self.content[page] == self.computed_from(lineage, tokens, index)
        missing = self.pages.pages_for(len(tokens)) - len(shared)
        if missing > self.pages.num_available - self.pages.num_cached_in(shared):
            return
        self.pages.hold(shared)
        fresh = self.pages.take(missing)
        assert fresh is not None
        for index, page in enumerate(fresh, start=len(shared)):
            self.content[page] = self.computed_from(lineage, tokens, index)
        self.owners.append((lineage, tokens, shared + fresh))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lineage, tokens, held = data.draw(st.sampled_from(self.owners))
        self.pages.publish(lineage, tokens, held)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.pages.release(self.owners.pop(index)[2])

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = {page for _, _, pages in self.owners for page in pages}
        assert self.pages.num_held == len(held)
        assert self.pages.num_available == self.NUM_PAGES - 1 - len(held)

    def teardown(self) -> None:
        for _, _, held in self.owners:
            self.pages.release(held)
        assert self.pages.num_held == 0


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), LINEAGES)
def test_published_prefix_is_found_again(tokens: list[int], lineage: Lineage) -> None:
    pages = PageAllocator(64, 4)
    held = pages.take(pages.pages_for(len(tokens))) or []
    pages.publish(lineage, tokens, held)
    pages.release(held)
    assert pages.match(lineage, [*tokens, 0]) == held[: len(tokens) // 4]
    unmarked = min((start for start, _ in lineage.marks), default=len(tokens)) // 4
    assert pages.match(BASE, [*tokens, 0]) == held[: min(unmarked, len(tokens) // 4)]


def test_publishing_goes_on_where_it_stopped_and_begins_again_when_that_is_gone() -> None:
    pages = PageAllocator(num_pages=7, page_size=2)
    first, second = pages.take(2), pages.take(3)
    assert first is not None
    assert second is not None
    published = Published()
    pages.publish(BASE, [1, 2, 3, 4], first)
    pages.publish(BASE, [1, 2, 3, 4], second, published)  # known already, as the first one's pages
    assert published.num_pages == 2
    pages.publish(BASE, [1, 2, 3, 4, 5, 6], second, published)
    assert pages.match(BASE, [1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pages.release(first)
    assert pages.take(3) is not None, "the first one's pages are evicted"
    assert pages.match(BASE, [1, 2, 3, 4, 5, 6, 7]) == []
    pages.publish(BASE, [1, 2, 3, 4, 5, 6], second, published)
    assert pages.match(BASE, [1, 2, 3, 4, 5, 6, 7]) == second[:2], "the third stands below what was evicted"
