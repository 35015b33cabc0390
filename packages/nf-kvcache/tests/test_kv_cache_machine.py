"""Random operations on a KVCache, against a model of plain lists and dicts.

The model has no tree, no reference counts and no order: a page can be found under all tokens up to
its end, from when it is full until it is given to somebody else, unless another one could be then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from nf_kvcache import KVCache, KVLayout, OutOfPages

NUM_PAGES = 12
PAGE_SIZE = 3

# What all sequences are cut from, so that they share beginnings of many lengths.
TEXTS = np.array([[0] * 40, [0] * 7 + [1] * 33, [0] * 3 + [2] * 37, [3] * 40], dtype=np.int32)
texts = st.sampled_from(range(len(TEXTS)))
prompts = st.builds(lambda text, stop: TEXTS[text, :stop], texts, st.integers(0, 20))


@dataclass
class Model:
    """One sequence."""

    pages: list[int]
    tokens: list[int] = field(default_factory=list)  # committed

    @property
    def room(self) -> int:
        return len(self.pages) * PAGE_SIZE


class KVCacheMachine(RuleBasedStateMachine):
    """Reserve, commit and release, with and without matches, in any order."""

    names = Bundle("names")

    def __init__(self):
        super().__init__()
        layout = KVLayout(1, 1, 8, torch.float32, page_size=PAGE_SIZE)
        self.cache = KVCache(layout, NUM_PAGES)
        self.sequences: dict[str, Model] = {}
        self.findable: dict[tuple[int, ...], int] = {}  # all tokens up to the end of the page
        self.count = 0
        self.evictions = 0

    def used(self) -> set[int]:
        return {page for model in self.sequences.values() for page in model.pages}

    @rule(target=names, tokens=prompts, num_tokens=st.integers(1, 30), use_match=st.booleans())
    def begin(self, tokens, num_tokens, use_match):
        match = self.cache.match(tokens) if use_match else None
        shared = []
        if match is not None:
            shared = match.pages[:, 0].tolist()
            event(f"pages matched: {min(len(shared), 3)}")
            assert shared == self.expected_match(tokens.tolist())
            assert match.num_tokens == len(shared) * PAGE_SIZE
            assert match.queried_tokens == len(tokens)
            num_tokens = max(num_tokens, match.num_tokens, 1)
        self.count += 1
        name = f"s{self.count}"
        used = self.used()
        needed = -(-num_tokens // PAGE_SIZE) - len(shared)
        fits = needed <= NUM_PAGES - len(used | set(shared))
        assert self.cache.can_reserve(name, num_tokens, match) == fits
        if not fits:
            before = self.cache.stats()
            with pytest.raises(OutOfPages, match="Release a sequence"):
                self.cache.reserve(name, num_tokens, match)
            assert self.cache.stats() == before
            return name  # never began
        self.cache.reserve(name, num_tokens, match)
        pages = self.pages_of(name)
        assert len(pages) == len(shared) + needed
        assert pages[: len(shared)] == shared
        self.take(pages[len(shared) :], used | set(shared))
        self.sequences[name] = Model(pages, tokens[: len(shared) * PAGE_SIZE].tolist())
        return name

    @rule(name=names, extra=st.integers(-5, 8))
    def grow(self, name, extra):
        if name not in self.sequences:
            return
        model = self.sequences[name]
        num_tokens = max(1, model.room + extra)
        needed = max(0, -(-num_tokens // PAGE_SIZE) - len(model.pages))
        used = self.used()
        fits = needed <= NUM_PAGES - len(used)
        assert self.cache.can_reserve(name, num_tokens) == fits
        if not fits:
            with pytest.raises(OutOfPages):
                self.cache.reserve(name, num_tokens)
            return
        self.cache.reserve(name, num_tokens)
        pages = self.pages_of(name)
        assert pages[: len(model.pages)] == model.pages
        assert len(pages) == len(model.pages) + needed
        self.take(pages[len(model.pages) :], used)
        model.pages = pages

    @rule(name=names, text=texts, count=st.integers(0, 12))
    def commit(self, name, text, count):
        if name not in self.sequences:
            return
        model = self.sequences[name]
        tokens = TEXTS[text, len(model.tokens) : len(model.tokens) + count]
        if len(model.tokens) + len(tokens) > model.room:
            with pytest.raises(ValueError, match="reserve more first"):
                self.cache.commit(name, tokens)
            return
        first = len(model.tokens) // PAGE_SIZE
        self.cache.commit(name, tokens)
        model.tokens.extend(tokens.tolist())
        for index in range(first, len(model.tokens) // PAGE_SIZE):
            key = tuple(model.tokens[: (index + 1) * PAGE_SIZE])
            self.findable.setdefault(key, model.pages[index])

    @rule(tokens=prompts)
    def match(self, tokens):
        assert self.cache.match(tokens).pages[:, 0].tolist() == self.expected_match(tokens.tolist())

    @rule(name=consumes(names))
    def release(self, name):
        if name in self.sequences:
            self.cache.release(name)
            del self.sequences[name]
        with pytest.raises(KeyError, match="released before, or never"):
            self.cache.release(name)

    @precondition(lambda self: self.sequences)
    @rule(width=st.integers(0, 4), data=st.data())
    def read_tables(self, width, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), min_size=1))
        longest = max(len(self.sequences[name].pages) for name in names)
        out = np.full((len(names), longest + width), -1, dtype=np.int32)
        assert self.cache.page_tables(names, out) is out
        for row, name in enumerate(names):
            pages = self.sequences[name].pages
            assert out[row].tolist() == pages + [0] * (longest + width - len(pages))
        assert np.array_equal(self.cache.page_tables(names), out[:, :longest])

    def expected_match(self, tokens: list[int]) -> list[int]:
        pages: list[int] = []
        for stop in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE):
            if tuple(tokens[:stop]) not in self.findable:
                break
            pages.append(self.findable[tuple(tokens[:stop])])
        return pages

    def pages_of(self, name: str) -> list[int]:
        return self.cache.page_tables([name])[0].tolist()

    def take(self, pages: list[int], used: set[int]) -> None:
        """`pages` were handed out: nobody has them, and what they held is gone."""
        assert len(set(pages)) == len(pages)
        assert not used & set(pages), "a page that is in use was given away"
        assert all(0 <= page < NUM_PAGES for page in pages)
        cached = set(self.findable.values()) - used
        evicted = cached & set(pages)
        num_free = NUM_PAGES - len(used) - len(cached)
        assert len(evicted) == max(0, len(pages) - num_free), "free pages come first"
        self.evictions += len(evicted)
        self.findable = {key: page for key, page in self.findable.items() if page not in pages}

    @invariant()
    def accounts_for_every_page(self):
        self.cache.check_integrity()
        stats = self.cache.stats()
        used = self.used()
        assert stats.pages_total == NUM_PAGES
        assert stats.pages_used == len(used)
        assert stats.pages_used + stats.pages_cached + stats.pages_free == NUM_PAGES
        assert stats.pages_cached == len(set(self.findable.values()) - used)
        assert stats.evictions == self.evictions
        assert stats.hit_tokens <= stats.queried_tokens

    def teardown(self):
        for name in list(self.sequences):
            self.cache.release(name)
        self.cache.check_integrity()
        assert self.cache.stats().pages_used == 0


KVCacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestKVCacheMachine = KVCacheMachine.TestCase
