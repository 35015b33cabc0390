"""Random operations on a SlotTree, against a model that searches everything anew each time."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nf_kvcache.disk.slot_tree import DOOMED, DROPPED, FREE, NONE, QUEUED, STORED, SlotTree

NUM_SLOTS = 9


@dataclass
class Page:
    slot: int
    parent: Page | None
    used: int
    state: int = QUEUED
    pins: int = 0


class SlotTreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = SlotTree(NUM_SLOTS)
        self.pages: list[Page] = []
        self.stamp = 0

    def pick(self, data: st.DataObject, *states: int) -> Page | None:
        pages = [page for page in self.pages if page.state in states]
        return data.draw(st.sampled_from(pages)) if pages else None

    def children(self, page: Page) -> list[Page]:
        return [child for child in self.pages if child.parent is page]

    def leave(self, page: Page) -> list[int]:
        """Take the descendants of a page out; which of them were stored."""
        gone = []
        for child in self.children(page):
            gone += self.leave(child)
            child.parent = None
            if child.state == QUEUED:
                child.state = DOOMED
            elif child.state == STORED:
                gone.append(child.slot)
                child.state = DROPPED
                self.free_if_unpinned(child)
        return gone

    def free_if_unpinned(self, page: Page) -> None:
        if page.pins == 0:
            self.pages.remove(page)

    @rule(data=st.data(), as_root=st.booleans())
    def take(self, data: st.DataObject, as_root: bool) -> None:
        parent = None if as_root else self.pick(data, QUEUED, STORED)
        self.stamp += 1
        slot = self.tree.take(parent.slot if parent else NONE, self.stamp)
        used = {page.slot for page in self.pages}
        free = [slot for slot in range(self.tree.limit) if slot not in used]
        assert (slot is None) == (not free)
        if slot is not None:
            assert slot in free
            self.pages.append(Page(slot, parent, self.stamp))

    @rule(data=st.data())
    def arrived(self, data: st.DataObject) -> None:
        page = self.pick(data, QUEUED, DOOMED)
        if page is None:
            return
        assert self.tree.arrived(page.slot) == (page.state == QUEUED)
        if page.state == DOOMED:
            event("doomed")
            self.pages.remove(page)
        else:
            page.state = STORED

    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        page = self.pick(data, QUEUED, DOOMED)
        if page is None:
            return
        gone = self.tree.failed(page.slot)
        assert sorted(gone) == sorted(self.leave(page))
        page.parent = None
        self.pages.remove(page)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = self.pick(data, STORED)
        if page is None:
            return
        gone = self.tree.drop(page.slot)
        assert sorted(gone) == sorted([page.slot, *self.leave(page)])
        page.parent, page.state = None, DROPPED
        self.free_if_unpinned(page)

    @rule()
    def evict(self) -> None:
        leaves = [
            page
            for page in self.pages
            if page.state == STORED and not page.pins and not self.children(page)
        ]
        slot = self.tree.evict()
        if not leaves:
            assert slot is None
            return
        page = min(leaves, key=lambda page: page.used)
        # Of two that were used at the same time (a page and one before it) either may go.
        (evicted,) = [leaf for leaf in leaves if leaf.slot == slot]
        assert evicted.used == page.used
        event("evicted")
        if evicted.parent is not None:
            evicted.parent.used = max(evicted.parent.used, evicted.used)
        self.pages.remove(evicted)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        page = self.pick(data, STORED)
        if page is not None:
            self.stamp += 1
            page.used = self.stamp
            self.tree.touch(page.slot, self.stamp)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        page = self.pick(data, STORED)
        if page is not None:
            page.pins += 1
            self.tree.pin(page.slot)

    @precondition(lambda self: any(page.pins for page in self.pages))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([page for page in self.pages if page.pins]))
        page.pins -= 1
        self.tree.unpin(page.slot)
        if page.state == DROPPED:
            self.free_if_unpinned(page)

    @rule(limit=st.integers(0, NUM_SLOTS))
    def set_limit(self, limit: int) -> None:
        self.tree.set_limit(limit)

    @invariant()
    def agrees(self) -> None:
        states = {page.slot: page.state for page in self.pages}
        assert list(self.tree.state) == [states.get(slot, FREE) for slot in range(NUM_SLOTS)]
        counts = [*states.values()]
        assert self.tree.num_stored == counts.count(STORED)
        assert self.tree.num_queued == counts.count(QUEUED) + counts.count(DOOMED)
        free = [slot for slot in range(self.tree.limit) if slot not in states]
        assert self.tree.num_free == len(free)
        for page in self.pages:
            children = sorted(child.slot for child in self.children(page))
            assert sorted(self.tree.children(page.slot)) == children
            assert self.tree.parent[page.slot] == (page.parent.slot if page.parent else NONE)


TestSlotTreeMachine = SlotTreeMachine.TestCase
TestSlotTreeMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
