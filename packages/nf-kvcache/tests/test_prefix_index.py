"""Both prefix indexes: what they promise, and that they do the same.

The one in Python has dictionaries keyed by the tokens themselves; so it tells what is right, also
where a few bits of hash make everything collide in the native one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from nf_kvcache.index import PrefixIndex, make_index
from nf_kvcache.python_prefix_index import PythonPrefixIndex
from nf_kvcache.tier import Tier

native = pytest.importorskip("nf_kvcache._native", reason="nf-kvcache has no native prefix index")

IMPLEMENTATIONS = {
    "python": PythonPrefixIndex,
    "native": native.PrefixIndex,
    "native, all hashes equal": lambda page_size: native.PrefixIndex(page_size, hash_bits=0),
}
PAGE_SIZE = 4
SALT = b"salt"


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request: pytest.FixtureRequest) -> Callable[[int], PrefixIndex]:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def index(make: Callable[[int], PrefixIndex]) -> PrefixIndex:
    return make(PAGE_SIZE)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def add(index: PrefixIndex, tokens: np.ndarray, tier: int = Tier.DEVICE, page: int = 0) -> int:
    """Place all full pages of tokens, from `page` on; the node of the last one."""
    size = index.page_size
    node = index.root(SALT)
    for i in range(len(tokens) // size):
        node = index.extend(node, tokens[i * size : (i + 1) * size])
        index.place(node, tier, page + i)
    return node


def test_walk_finds_the_longest_prefix_and_its_page_in_every_tier(index: PrefixIndex) -> None:
    tokens = np.arange(12, dtype=np.int32)
    last = add(index, tokens, page=5)
    index.place(last, Tier.DISK, 9)
    index.displace(last, Tier.DEVICE)
    nodes, pages = index.walk(SALT, np.arange(15, dtype=np.int32))
    assert nodes.dtype == np.int64
    assert pages.dtype == np.int32
    assert nodes.tolist() == [index.parent(index.parent(last)), index.parent(last), last]
    assert pages.tolist() == [[5, -1, -1], [6, -1, -1], [-1, -1, 9]]
    tokens[9] = 77
    assert index.walk(SALT, tokens)[0].tolist() == nodes[:2].tolist()
    assert len(index.walk(b"another salt", tokens)[0]) == 0


@pytest.mark.parametrize("count", [0, 1, PAGE_SIZE - 1])
def test_less_than_a_page_is_found_nowhere(index: PrefixIndex, count: int) -> None:
    add(index, np.zeros(8, dtype=np.int32))
    nodes, pages = index.walk(SALT, np.zeros(count, dtype=np.int32))
    assert (nodes.shape, nodes.dtype) == ((0,), np.int64)
    assert (pages.shape, pages.dtype) == ((0, 3), np.int32)


def test_walk_stops_where_a_page_is_in_no_tier(index: PrefixIndex) -> None:
    tokens = np.arange(12, dtype=np.int32)
    last = add(index, tokens)
    middle = index.parent(last)
    index.displace(middle, Tier.DEVICE)
    assert index.is_alive(middle)  # its child needs it
    assert len(index.walk(SALT, tokens)[0]) == 1
    index.place(middle, Tier.HOST, 3)
    assert index.walk(SALT, tokens)[1].tolist() == [[0, -1, -1], [-1, 3, -1], [2, -1, -1]]


def test_walk_takes_tokens_that_are_not_side_by_side(index: PrefixIndex) -> None:
    tokens = np.arange(24, dtype=np.int32)
    add(index, tokens[::3])
    assert len(index.walk(SALT, tokens[::3])[0]) == 2
    assert len(index.walk(SALT, tokens)[0]) == 0


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 5, 7, 16, 33])
def test_each_token_of_a_page_counts(make: Callable[[int], PrefixIndex], page_size: int) -> None:
    """In identity as in the hash: pages that differ in one token are different nodes."""
    index = make(page_size)
    base = np.zeros(page_size, dtype=np.int32)
    root = index.root(SALT)
    variants = [base]
    for at in range(page_size):
        for value in (1, -1, 2**31 - 1, -(2**31)):
            variants.append(base.copy())
            variants[-1][at] = value
    nodes = [index.extend(root, tokens) for tokens in variants]
    assert len(set(nodes)) == len(variants)
    for node, tokens in zip(nodes, variants, strict=True):
        assert index.extend(root, tokens) == node
        assert np.array_equal(index.tokens(node), tokens)
    index.check_integrity()


def test_a_page_after_others_is_another_node(index: PrefixIndex) -> None:
    page = ints(1, 2, 3, 4)
    first = index.extend(index.root(SALT), page)
    second = index.extend(first, page)
    foreign = index.extend(index.root(b""), page)
    assert len({first, second, foreign}) == 3
    assert index.num_children(first) == 1
    assert index.num_children(second) == 0


def test_roots(index: PrefixIndex) -> None:
    salts = [b"", b"\0", b"\0\0", b"tenant", bytes(range(256))]
    roots = [index.root(salt) for salt in salts]
    assert len(set(roots)) == len(salts)
    assert [index.root(salt) for salt in salts] == roots
    assert [index.salt(root) for root in roots] == salts
    assert {index.parent(root) for root in roots} == {0}
    assert index.tokens(roots[0]).shape == (0,)
    assert index.page(roots[0], Tier.DISK) == -1
    assert sorted(index.nodes().tolist()) == sorted(roots)


def test_a_node_without_page_child_and_hold_is_removed_and_its_name_not_used_again(
    index: PrefixIndex,
) -> None:
    names = set()
    for _ in range(5):
        node = add(index, np.arange(8, dtype=np.int32))
        parent, root = index.parent(node), index.root(SALT)
        assert not names & {node, parent, root}
        names |= {node, parent, root}
        index.hold(root)
        index.displace(parent, Tier.DEVICE)
        assert len(index) == 3
        index.displace(node, Tier.DEVICE)
        assert index.nodes().tolist() == [root]
        index.unhold(root)
        assert len(index) == 0
        assert not any(index.is_alive(name) for name in names)


def test_holds_compares_nodes_and_pages(index: PrefixIndex) -> None:
    tokens = np.arange(12, dtype=np.int32)
    last = add(index, tokens, Tier.HOST)
    nodes, pages = index.walk(SALT, tokens)
    there = np.ascontiguousarray(pages[:, Tier.HOST])
    assert index.holds(nodes, Tier.HOST, there)
    assert index.holds(nodes, Tier.HOST, pages[:, Tier.HOST])  # not side by side
    assert index.holds(nodes[:0], Tier.HOST, there[:0])
    assert not index.holds(nodes, Tier.DEVICE, there)
    assert not index.holds(nodes, Tier.DEVICE, pages[:, Tier.DEVICE])  # -1 is no page
    assert not index.holds(nodes[::-1], Tier.HOST, there)
    index.place(last, Tier.HOST, 50)
    assert not index.holds(nodes, Tier.HOST, there)
    index.displace(last, Tier.HOST)
    assert not index.holds(nodes, Tier.HOST, there)
    assert index.holds(nodes[:2], Tier.HOST, there[:2])


def test_arguments_that_are_refused(index: PrefixIndex) -> None:
    node = add(index, np.arange(4, dtype=np.int32))
    root, gone = index.root(SALT), node + 12345
    nodes, pages, page = np.array([node]), ints(0), ints(1, 2, 3, 4)
    calls: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "tokens is int64", lambda: index.walk(SALT, np.arange(4))),
        (ValueError, "tokens is float32", lambda: index.walk(SALT, np.zeros(4, np.float32))),
        (ValueError, "tokens is >i4", lambda: index.walk(SALT, np.zeros(4, ">i4"))),
        (ValueError, r"int32 \(2, 4\)", lambda: index.walk(SALT, np.zeros((2, 4), np.int32))),
        (ValueError, r"expected int32 \[4\]", lambda: index.extend(node, ints(1, 2, 3))),
        (ValueError, r"expected int32 \[4\]", lambda: index.extend(node, ints(1, 2, 3, 4, 5))),
        (ValueError, "tier is 3", lambda: index.place(node, 3, 0)),
        (ValueError, "tier is -1", lambda: index.displace(node, -1)),
        (ValueError, "tier is 3", lambda: index.page(node, 3)),
        (ValueError, "tier is 3", lambda: index.holds(nodes, 3, pages)),
        (ValueError, "page is -1", lambda: index.place(node, 0, -1)),
        (ValueError, "page is 2147483648", lambda: index.place(node, 0, 2**31)),
        (ValueError, "is a root", lambda: index.place(root, 0, 0)),
        (ValueError, "no page in tier 1", lambda: index.displace(node, 1)),
        (ValueError, "is not held", lambda: index.unhold(node)),
        (ValueError, "is not a root", lambda: index.salt(node)),
        (ValueError, "nodes is int32", lambda: index.holds(pages, 0, pages)),
        (ValueError, "pages is int64", lambda: index.holds(nodes, 0, nodes)),
        (ValueError, r"expected int32 \[1\]", lambda: index.holds(nodes, 0, ints(0, 1))),
        (TypeError, "numpy", lambda: index.walk(SALT, [1, 2, 3, 4])),
        (ValueError, "is not held", lambda: index.advance(nodes, page, 0, pages)),
        (ValueError, r"expected int32 \[4\]", lambda: index.advance(nodes, ints(1), 0, pages)),
        (
            ValueError,
            r"expected int32 \[1\]",
            lambda: index.advance(nodes, page, 0, ints()),
        ),
        (ValueError, "tier is 3", lambda: index.advance(nodes, page, 3, pages)),
    ]
    for name in (gone, 0, -1, 1 << 62, node + 2**40):
        calls += [
            (KeyError, "not in the index", lambda name=name: index.extend(name, ints(1, 2, 3, 4))),
            (KeyError, "not in the index", lambda name=name: index.place(name, 0, 0)),
            (KeyError, "not in the index", lambda name=name: index.displace(name, 0)),
            (KeyError, "not in the index", lambda name=name: index.page(name, 0)),
            (KeyError, "not in the index", lambda name=name: index.hold(name)),
            (KeyError, "not in the index", lambda name=name: index.unhold(name)),
            (KeyError, "not in the index", lambda name=name: index.parent(name)),
            (KeyError, "not in the index", lambda name=name: index.salt(name)),
            (KeyError, "not in the index", lambda name=name: index.tokens(name)),
            (KeyError, "not in the index", lambda name=name: index.num_children(name)),
            (KeyError, "not in the index", lambda name=name: index.holders(name)),
        ]
        assert not index.is_alive(name)
        assert not index.holds(np.array([name]), 0, pages)
    for expected, message, call in calls:
        with pytest.raises(expected, match=message):
            call()
    assert len(index) == 2
    assert index.page(node, 0) == 0
    index.check_integrity()


def test_sizes_that_are_refused() -> None:
    for make in (PythonPrefixIndex, native.PrefixIndex, make_index):
        for page_size in (0, -1, 65537):
            with pytest.raises(ValueError, match=f"page_size is {page_size}; expected 1 to 65536"):
                make(page_size)
    for bits in (-1, 65):
        with pytest.raises(ValueError, match=f"hash_bits is {bits}; expected 0 to 64"):
            native.PrefixIndex(16, hash_bits=bits)


@pytest.mark.parametrize("make", [PythonPrefixIndex, native.PrefixIndex])
def test_a_chain_of_100000_nodes_goes_at_once(make: Callable[[int], PrefixIndex]) -> None:
    index = make(1)
    tokens = np.zeros(100_000, dtype=np.int32)
    node = add(index, tokens)
    nodes, _ = index.walk(SALT, tokens)
    assert len(nodes) == len(tokens)
    index.hold(node)
    for name in nodes.tolist():
        index.displace(name, Tier.DEVICE)
    assert len(index) == len(tokens) + 1
    assert len(index.walk(SALT, tokens)[0]) == 0
    index.unhold(node)
    assert len(index) == 0
    index.check_integrity()


@pytest.mark.parametrize("bits", [10, 64])
def test_what_is_left_after_many_removals_is_found(bits: int) -> None:
    """Clusters of a table that is full to 3/4, removed from in random order."""
    index = native.PrefixIndex(2, hash_bits=bits)
    count = (1 << 14) * 3 // 4 - 2
    rng = np.random.default_rng(0)
    tokens = rng.permutation(2 * count).astype(np.int32).reshape(count, 2)
    root = index.root(SALT)
    nodes = [index.extend(root, page) for page in tokens]
    for page, node in enumerate(nodes):
        index.place(node, Tier.DEVICE, page)
    order = rng.permutation(count)
    for i in order[: count // 2]:
        index.displace(nodes[i], Tier.DEVICE)
    index.check_integrity()
    for i in order[: count // 2]:
        assert len(index.walk(SALT, tokens[i])[0]) == 0
    for i in order[count // 2 :]:
        assert index.walk(SALT, tokens[i])[0].tolist() == [nodes[i]]


@pytest.mark.parametrize("bits", [0, 5, 64])
@pytest.mark.parametrize("page_size", [1, 4, 6])
def test_long_paths_end_where_the_twin_says(page_size: int, bits: int) -> None:
    """At a token that differs or a page that is nowhere: early, late, or not at all."""
    rng = np.random.default_rng(bits)
    count, half = 300, 150 * page_size
    texts = rng.integers(0, 3, (4, count * page_size), dtype=np.int32)
    texts[3, :half] = texts[0, :half]  # two that share a beginning
    indexes = native.PrefixIndex(page_size, hash_bits=bits), PythonPrefixIndex(page_size)
    for index in indexes:
        for text in texts:
            add(index, text)

    def compare(text: np.ndarray) -> int:
        (nodes, pages), (twins, expected) = (index.walk(SALT, text) for index in indexes)
        assert len(nodes) == len(twins)
        assert pages.tolist() == expected.tolist()
        found = [indexes[0].tokens(node) for node in nodes.tolist()]
        assert np.array_equal(np.array(found).reshape(-1), text[: len(nodes) * page_size])
        return len(nodes)

    for stop in [*range(140), 149, 150, 151, *rng.integers(152, count, 20).tolist()]:
        text = texts[stop % len(texts)]
        assert compare(text[: stop * page_size]) == stop
        paths = [index.walk(SALT, text)[0].tolist() for index in indexes]
        assert len(paths[0]) == count
        if stop == count - 1:
            continue  # without its page the last node would be gone
        for index, path in zip(indexes, paths, strict=True):
            index.displace(path[stop], Tier.DEVICE)
        assert compare(text) == stop
        for index, path in zip(indexes, paths, strict=True):
            index.place(path[stop], Tier.DEVICE, count + stop)
        changed = text.copy()
        changed[stop * page_size + int(rng.integers(page_size))] += 5
        assert compare(changed) == stop
        assert compare(text) == count


KINDS = st.integers(0, 2)
PATHS = st.lists(KINDS, max_size=12)
SALTS = st.sampled_from([b"", b"s"])
TIERS = st.sampled_from(Tier)
PICKS = st.integers(0, 999)


class Machine(RuleBasedStateMachine):
    """The same operations on both; every answer and, after each, the whole content is compared.

    Names differ between the two: operations are told those of the twin, and `native_of` and
    `twin_of` translate. Nodes that were removed are named too: that has to fail in both.
    """

    make_twin: type[PythonPrefixIndex] = PythonPrefixIndex

    @initialize(page_size=st.sampled_from([1, 2, 5]), hash_bits=st.sampled_from([0, 1, 3, 64]))
    def start(self, page_size, hash_bits):
        self.native = native.PrefixIndex(page_size, hash_bits)
        self.twin = self.make_twin(page_size)
        self.twin_of = {0: 0}
        self.native_of = {0: 0}

    def both(self, method, node, *arguments):
        """Call both: their results, or what stands for their errors."""
        outcomes = []
        for index, name in ((self.native, self.native_of[node]), (self.twin, node)):
            try:
                outcomes.append(getattr(index, method)(name, *arguments))
            except (KeyError, ValueError) as error:
                message = re.sub(r"[Nn]ode -?\d+", "node", str(error))
                outcomes.append((type(error).__name__, message))
        return outcomes

    def same(self, method, node, *arguments):
        first, second = self.both(method, node, *arguments)
        assert first == second

    def meet(self, first, second):
        """Both named a node, perhaps a new one: no name may ever stand for two."""
        assert first > 0
        assert self.twin_of.setdefault(first, second) == second
        assert self.native_of.setdefault(second, first) == first
        return second

    def pick(self, number):
        """A node, seven times of eight one that is in the index."""
        alive = sorted(self.twin.nodes().tolist())
        names = sorted(self.native_of) if number % 8 == 0 or not alive else alive
        return names[number // 8 % len(names)]

    def pages(self, kinds):
        """Full pages, each one of three that differ in a token or in all."""
        size = self.twin.page_size
        pages = np.zeros((len(kinds), size), dtype=np.int32)
        pages[np.array(kinds, dtype=int) == 1] = 1
        pages[:, -1] = kinds
        return pages.reshape(-1)

    @rule(salt=SALTS, path=PATHS, tier=TIERS, page=st.integers(0, 2**31 - 1))
    def add(self, salt, path, tier, page):
        node = self.meet(self.native.root(salt), self.twin.root(salt))
        for kind in path:
            node = self.meet(*self.both("extend", node, self.pages([kind])))
            self.same("place", node, tier, page)

    @rule(number=PICKS, kind=KINDS)
    def extend(self, number, kind):
        first, second = self.both("extend", self.pick(number), self.pages([kind]))
        if isinstance(first, tuple):
            assert first == second
        else:
            self.meet(first, second)

    @rule(number=PICKS, tier=st.integers(-1, 3), page=st.integers(-1, 3))
    def place(self, number, tier, page):
        self.same("place", self.pick(number), tier, page)

    @rule(number=PICKS, tier=st.integers(-1, 3))
    def displace(self, number, tier):
        self.removes("displace", self.pick(number), tier)

    @rule(number=PICKS, count=st.integers(1, 12))
    def displace_a_path_from_all_tiers(self, number, count):
        """From its end, or from a node within."""
        node = self.pick(number)
        for _ in range(count):
            parent = self.twin.parent(node) if self.twin.is_alive(node) else 0
            for tier in Tier:
                self.removes("displace", node, tier)
            node = parent

    @rule(number=PICKS)
    def hold(self, number):
        self.same("hold", self.pick(number))

    @rule(number=PICKS, from_held=st.booleans())
    def unhold(self, number, from_held):
        held = sorted(n for n in self.twin.nodes().tolist() if self.twin.holders(n))
        held = held if from_held else []
        self.removes("unhold", held[number % len(held)] if held else self.pick(number))

    @rule(numbers=st.lists(PICKS, max_size=4), kind=KINDS, tier=st.integers(-1, 3), page=PICKS)
    def advance(self, numbers, kind, tier, page):
        """Of nodes most of which are held, some of them twice."""
        held = sorted(n for n in self.twin.nodes().tolist() if self.twin.holders(n))
        nodes = [held[n // 8 % len(held)] if held and n % 8 else self.pick(n) for n in numbers]
        kinds = [(kind + number) % 3 for number in range(len(nodes))]
        pages = np.arange(len(nodes), dtype=np.int32) + page - (page % 50 == 0)
        outcomes = []
        for index, names in (
            (self.native, [self.native_of[node] for node in nodes]),
            (self.twin, nodes),
        ):
            try:
                names = np.array(names, dtype=np.int64)
                outcomes.append(index.advance(names, self.pages(kinds), tier, pages))
            except (KeyError, ValueError) as error:
                outcomes.append(re.sub(r"[Nn]ode -?\d+", "node", str(error)))
        event(f"advanced: {not isinstance(outcomes[0], str)}")
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]
            return
        (first, placed), (second, expected) = outcomes
        assert placed.tolist() == expected.tolist()
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            self.meet(one, other)

    def removes(self, method, node, *arguments):
        before = len(self.twin)
        self.same(method, node, *arguments)
        event(f"{method} removed: {min(before - len(self.twin), 3)}")

    @rule(salt=SALTS, path=PATHS, rest=st.integers(0, 1))
    def walk(self, salt, path, rest):
        self.compare_walks(salt, np.append(self.pages(path), np.zeros(rest, dtype=np.int32)))

    @rule(number=PICKS, salt=SALTS, path=PATHS)
    def walk_to_a_node_and_on(self, number, salt, path):
        node, tokens = self.pick(number), [self.pages(path)]
        while self.twin.is_alive(node):
            tokens.append(self.twin.tokens(node))
            node = self.twin.parent(node)
        self.compare_walks(salt, np.concatenate(tokens[::-1]))

    def compare_walks(self, salt, tokens):
        nodes, pages = self.native.walk(salt, tokens)
        expected_nodes, expected_pages = self.twin.walk(salt, tokens)
        event(f"pages walked: {min(len(expected_nodes), 10)}")
        assert [self.twin_of[node] for node in nodes.tolist()] == expected_nodes.tolist()
        assert pages.tolist() == expected_pages.tolist()
        for tier in Tier:
            answers = {
                self.native.holds(nodes, tier, pages[:, tier]),
                self.twin.holds(expected_nodes, tier, expected_pages[:, tier]),
            }
            assert answers == {bool((pages[:, tier] != -1).all())}

    @invariant()
    def same_content(self):
        self.native.check_integrity()
        self.twin.check_integrity()
        alive = self.native.nodes().tolist()
        assert len(alive) == len(self.native) == len(self.twin)
        assert {self.twin_of[node] for node in alive} == set(self.twin.nodes().tolist())
        for node in self.native_of:
            for method in ("is_alive", "num_children", "holders", "salt"):
                self.same(method, node)
            for tier in Tier:
                self.same("page", node, tier)
            first, second = self.both("parent", node)
            assert self.twin_of.get(first, first) == second
            first, second = self.both("tokens", node)
            assert np.array_equal(first, second)


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestBothIndexes = Machine.TestCase


class PrunesOneNode(PythonPrefixIndex):
    """Leaves the parents of a removed node behind."""

    def _prune(self, name: int) -> None:
        node = self._node(name)
        parent, holders = node.parent, 0
        if parent != 0:
            holders, self._nodes[parent].holders = self._nodes[parent].holders, 1
        super()._prune(name)
        if parent != 0:
            self._nodes[parent].holders = holders


class WalksOverGaps(PythonPrefixIndex):
    """Finds prefixes whose first page is nowhere."""

    def walk(self, salt: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = self._names.get((self._names.get((0, salt)), tokens[: self.page_size].tobytes()))
        if first is None or self._nodes[first].is_placed:
            return super().walk(salt, tokens)
        self._nodes[first].pages[0] = 0
        nodes, pages = super().walk(salt, tokens)
        self._nodes[first].pages[0] = pages[0, 0] = -1
        return nodes, pages


@pytest.mark.parametrize("fault", [PrunesOneNode, WalksOverGaps])
def test_the_comparison_sees_a_fault(fault: type[PythonPrefixIndex]) -> None:
    machine = type("Faulty", (Machine,), {"make_twin": fault})
    quick = settings(max_examples=300, stateful_step_count=40, deadline=None, database=None)
    quick = settings(quick, phases=[Phase.generate], derandomize=True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=quick)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise {error}
sys.meta_path.insert(0, Block())
"""
USE = """
from nf_kvcache.index import make_index
print(type(make_index(16)).__module__, type(make_index(4)).__module__, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModuleNotFoundError(name)", "was installed without a C++ compiler"),
        ("ImportError('undefined symbol: f')", "does not load: undefined symbol: f"),
    ],
)
def test_without_the_extension_python_serves_after_one_warning(error: str, message: str) -> None:
    result = run_python(BLOCK.format(name="nf_kvcache._native", error=error) + USE)
    assert result.returncode == 0, result.stderr
    twin = "nf_kvcache.python_prefix_index"
    assert result.stdout.split() == [twin, twin, "False"]
    assert result.stderr.count("The prefix index runs in Python") == 1
    assert message in result.stderr


def test_the_extension_serves_without_a_warning_and_without_torch() -> None:
    result = run_python(BLOCK.format(name="torch", error="ModuleNotFoundError(name)") + USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["nf_kvcache._native", "nf_kvcache._native", "False"]
    assert result.stderr == ""
    assert type(make_index(16, native=False)) is PythonPrefixIndex


def test_labels_of_tiers() -> None:
    assert [(int(tier), tier.label) for tier in Tier] == [(0, "device"), (1, "host"), (2, "disk")]
