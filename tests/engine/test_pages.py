"""The page allocator: references, reuse order, and a prefix index that is never wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.state.pages import PageAllocator, Published


def test_page_zero_is_never_handed_out() -> None:
    pages = PageAllocator(5, 4)
    assert sorted(pages.take(4) or []) == [1, 2, 3, 4]
    assert pages.take(1) is None


def test_match_leaves_one_token_to_compute() -> None:
    pages = PageAllocator(8, 4)
    held = pages.take(2) or []
    pages.publish((), list(range(8)), held)
    pages.release(held)
    assert pages.match((), list(range(8))) == held[:1]
    assert pages.match((), list(range(9))) == held


def test_namespace_and_tokens_both_count() -> None:
    pages = PageAllocator(8, 2)
    held = pages.take(2) or []
    pages.publish(("a", 1.0), [1, 2, 3, 4], held)
    assert pages.match(("b", 1.0), [1, 2, 3, 4, 5]) == []
    assert pages.match(("a", 0.5), [1, 2, 3, 4, 5]) == []
    assert pages.match(("a", 1.0), [1, 2, 9, 4, 5]) == held[:1]
    assert pages.match(("a", 1.0), [9, 2, 3, 4, 5]) == []


def test_tail_of_a_chain_is_reused_first() -> None:
    pages = PageAllocator(4, 1)
    held = pages.take(3) or []
    pages.publish((), [7, 8, 9], held)
    pages.release(held)
    assert pages.take(1) == [held[2]]
    assert pages.match((), [7, 8, 9, 9]) == held[:2]


def test_prefix_cache_off_finds_nothing() -> None:
    pages = PageAllocator(4, 1, prefix_cache=False)
    held = pages.take(2) or []
    pages.publish((), [1, 2], held)
    pages.release(held)
    assert pages.match((), [1, 2, 3]) == []
    assert pages.num_cached == 0


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (4, 0)])
def test_sizes_are_checked(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(num_pages, page_size)


class AllocatorMachine(RuleBasedStateMachine):
    """Owners take, share, publish and release in any order; content is modelled as the tokens written to each page."""

    NUM_PAGES, PAGE_SIZE = 9, 2

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(self.NUM_PAGES, self.PAGE_SIZE)
        self.owners: list[tuple[str, list[int], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> namespace and all tokens up to its end

    @rule(namespace=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def begin(self, namespace: str, tokens: list[int]) -> None:
        shared = self.pages.match(namespace, tokens)
        for index, page in enumerate(shared):
            assert self.content[page] == (namespace, tuple(tokens[: (index + 1) * self.PAGE_SIZE]))
        missing = self.pages.pages_for(len(tokens)) - len(shared)
        if missing > self.pages.num_available - self.pages.num_cached_in(shared):
            return
        self.pages.hold(shared)
        fresh = self.pages.take(missing)
        assert fresh is not None
        for index, page in enumerate(fresh, start=len(shared)):
            self.content[page] = (namespace, tuple(tokens[: (index + 1) * self.PAGE_SIZE]))
        self.owners.append((namespace, tokens, shared + fresh))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        namespace, tokens, held = data.draw(st.sampled_from(self.owners))
        self.pages.publish(namespace, tokens, held)

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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_published_prefix_is_found_again(tokens: list[int]) -> None:
    pages = PageAllocator(64, 4)
    held = pages.take(pages.pages_for(len(tokens))) or []
    pages.publish("x", tokens, held)
    pages.release(held)
    assert pages.match("x", [*tokens, 0]) == held[: len(tokens) // 4]


def test_publishing_goes_on_where_it_stopped_and_begins_again_when_that_is_gone() -> None:
    pages = PageAllocator(num_pages=7, page_size=2)
    first, second = pages.take(2), pages.take(3)
    assert first is not None
    assert second is not None
    published = Published()
    pages.publish("base", [1, 2, 3, 4], first)
    pages.publish("base", [1, 2, 3, 4], second, published)  # known already, as the first one's pages
    assert published.num_pages == 2
    pages.publish("base", [1, 2, 3, 4, 5, 6], second, published)
    assert pages.match("base", [1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pages.release(first)
    assert pages.take(3) is not None, "the first one's pages are evicted"
    assert pages.match("base", [1, 2, 3, 4, 5, 6, 7]) == []
    pages.publish("base", [1, 2, 3, 4, 5, 6], second, published)
    assert pages.match("base", [1, 2, 3, 4, 5, 6, 7]) == second[:2], "the third stands below what was evicted"
