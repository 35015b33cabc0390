"""Batches at the edges: few rows, odd rows, full pages, slow lanes, pages full of NaN.

Under every plan with several nano-batches they answer what the sequential plan answers, and each
edge has to be seen in an iteration that ran so.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from feature_cells import (
    VALUES,
    Answers,
    answers_of,
    differences,
    generate,
    load,
)
from feature_checks import check_nothing_is_left, check_traces

from nf_kernels import native_status
from nf_kvcache import KVCache
from nf_runtime import LLM, SamplingParams
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Reason
from nf_runtime.staging import StagingRing
from nf_runtime.timeline import IterationTrace

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
PLANS = {"nanoflow": 2, "nanoflow-4": 4, "pd-multiplex": 2, "co-resident": 2}  # nano-batches
LONG = {"max_position_embeddings": 512}
ROOM = 400  # tokens of an iteration
WIDE: dict[str, Any] = {
    "max_model_len": ROOM + 48,
    "max_num_batched_tokens": ROOM,
    "kv_cache_tokens": 2048,
}

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="lanes of a CPU need the native kernels"
)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts, no two of which begin alike."""
    generator = np.random.default_rng(sum(lengths))
    return [[i, *generator.integers(0, 200, n - 1).tolist()] for i, n in enumerate(lengths)]


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def expect(tiny_checkpoint: MakeCheckpoint) -> Iterator[Callable[..., Answers]]:
    """Give `expect(family, prompts, params)`: the answers of one request at a time."""
    llms: dict[str, LLM] = {}
    known: dict[str, Answers] = {}

    def answers(family: str, prompts: Sequence[list[int]], params: SamplingParams) -> Answers:
        if family not in llms:
            llms[family], _ = load(
                tiny_checkpoint(family, **LONG),
                async_scheduling=False,
                overlap="off",
                enable_prefix_caching=False,
                max_model_len=ROOM + 48,
                max_num_batched_tokens=512,
                kv_cache_tokens=4096,
            )
        key = repr((family, prompts, params))
        if key not in known:
            outputs = [generate(llms[family], [prompt], params)[0] for prompt in prompts]
            known[key] = answers_of(outputs)
        return known[key]

    yield answers
    for llm in llms.values():
        llm.shutdown()


@dataclass(frozen=True)
class Edge:
    """A kind of batch.

    Attributes:
        name: In words.
        lengths: Of the prompts, by plan.
        count: Tokens of each answer.
        is_seen: Whether an iteration of a plan is of the kind.
        alone: Plans that have all of it in one nano-batch, and so run it sequentially.
    """

    name: str
    lengths: Callable[[str], list[int]]
    count: int
    is_seen: Callable[[IterationTrace, str], bool]
    alone: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def sizes(trace: IterationTrace) -> list[int]:
    """Tokens of each nano-batch."""
    return [end - start for start, end in itertools.pairwise(trace.division.bounds)]


def requests(trace: IterationTrace) -> list[int]:
    """Requests of each nano-batch, one that is cut counting in each part."""
    decodes = np.diff(np.minimum(trace.division.bounds, trace.decodes))
    return (decodes + np.diff(trace.division.first_segment)).tolist()


EDGES = [
    Edge(
        "one request in each nano-batch",
        lambda plan: [5, ROOM - 1] if plan == "pd-multiplex" else [5] * PLANS[plan],
        4,
        lambda trace, plan: requests(trace) == [1] * PLANS[plan],
    ),
    Edge(
        "no decodes",
        lambda plan: [33, 20, 17, 40],
        1,
        lambda trace, plan: trace.decodes == 0 and len(trace.contexts) == 4,
        alone=("pd-multiplex",),
    ),
    Edge(
        "no prefills",
        lambda plan: [3, 9, 16, 5, 8, 2],
        8,
        lambda trace, plan: trace.decodes == trace.tokens == 6,
        alone=("pd-multiplex",),
    ),
    Edge(
        "odd sizes",
        lambda plan: [3, 7, 111, 5, 9, 17, ROOM - 149],
        9,
        lambda trace, plan: trace.tokens % 2 == 1 and min(sizes(trace)) < max(sizes(trace)),
    ),
    Edge(
        "one giant prefill",
        lambda plan: [ROOM - 67],
        3,
        lambda trace, plan: (trace.tokens, len(trace.contexts)) == (ROOM - 67, 1),
        alone=("pd-multiplex",),
    ),
    Edge(
        "more nano-batches than tokens",
        lambda plan: [3] * (PLANS[plan] // 2),
        6,
        lambda trace, plan: trace.tokens < PLANS[plan],
        alone=("nanoflow", "pd-multiplex", "co-resident"),
    ),
]


@pytest.mark.parametrize("edge", EDGES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", VALUES["family"])
def test_a_batch_at_the_edge_is_answered_as_by_the_sequential_plan(
    family: str,
    plan: str,
    edge: Edge,
    tiny_checkpoint: MakeCheckpoint,
    expect: Callable[..., Answers],
) -> None:
    prompts, params = prompts_of(edge.lengths(plan)), greedy(edge.count)
    expected = expect(family, prompts, params)
    llm, seen = load(tiny_checkpoint(family, **LONG), **WIDE, overlap=plan)
    with llm:
        assert differences(answers_of(generate(llm, prompts, params)), expected) == []
        check_nothing_is_left(llm)
        check_traces(llm, seen)
    reasons = {trace.reason for trace in seen.traces if edge.is_seen(trace, plan)}
    assert reasons == {Reason.ONE_NANO_BATCH if plan in edge.alone else Reason.PLANNED}


@pytest.mark.parametrize("mode", VALUES["mode"])
@pytest.mark.parametrize("family", VALUES["family"])
def test_prompts_that_just_fill_pages_are_found_up_to_their_last_token(
    family: str, mode: str, tiny_checkpoint: MakeCheckpoint, expect: Callable[..., Answers]
) -> None:
    """One page, one token less and more, several pages; what is found leaves a token to compute."""
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 256, 257]
    prompts = prompts_of(lengths)
    options = WIDE | {"async_scheduling": mode != "sync", "max_num_seqs": 16}
    overlap = mode if mode in PLANS else "off"
    llm, seen = load(tiny_checkpoint(family, **LONG), **options, overlap=overlap)
    with llm:
        for number, count in enumerate((2, 1, 18)):
            params = greedy(count)
            expected = expect(family, prompts, params)
            outputs = generate(llm, prompts, params)
            assert differences(answers_of(outputs), expected) == []
            ledgers = [output.outputs[0].ledger for output in outputs]
            found = [(n - 1) // 16 * 16 if number else 0 for n in lengths]
            assert [ledger and ledger.cached_tokens for ledger in ledgers] == found
            check_nothing_is_left(llm)
        check_traces(llm, seen)
    if mode in PLANS:
        assert any(trace.reason is Reason.PLANNED for trace in seen.traces)


def delay_lanes(llm: LLM, seconds: float) -> list[int]:
    """Let one lane of each iteration, another one each time, begin late.

    Returns:
        The lanes that did, as they do.
    """
    api, random, late = llm.engine.executor._api, Random(3), []
    streams = api.streams

    def delayed(plan: Plan) -> Sequence[Any]:
        given = streams(plan)
        late.append(random.randrange(len(given)))
        given[late[-1]].call(partial(time.sleep, seconds))
        return given

    api.streams = delayed  # type: ignore[method-assign]
    return late


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_late_lane_reads_what_was_staged_for_it(
    plan: str, buffers: int, tiny_checkpoint: MakeCheckpoint, expect: Callable[..., Answers]
) -> None:
    """Iterations are staged while others that were staged before have not begun."""
    prompts, params = prompts_of([40, 3, 17, 90, 5, 28]), greedy(10)
    expected = expect("mixtral", prompts, params)
    options = WIDE | {"max_prefill_chunk": 16}
    llm, seen = load(tiny_checkpoint("mixtral", **LONG), **options, overlap=plan)
    with llm:
        llm.engine.executor._ring = StagingRing(buffers, CPU)
        late = delay_lanes(llm, 0.004)
        assert differences(answers_of(generate(llm, prompts, params)), expected) == []
        assert set(late) == {0, 1, 2}
        assert llm.engine.stats.iterations_ahead > 0
        check_nothing_is_left(llm)
        check_traces(llm, seen)


@pytest.mark.parametrize("plan", ["nanoflow", "nanoflow-4", "co-resident"])
def test_a_buffer_without_a_guard_is_overwritten_before_a_late_lane_reads_it(
    plan: str, tiny_checkpoint: MakeCheckpoint, expect: Callable[..., Answers]
) -> None:
    """The comparison sees the fault that guards are there for, or an operation refuses it.

    It comes when all requests decode within their first page: what is read in place of what was
    staged is then of the same shape, and in range.
    """
    prompts, params = prompts_of([5, 3, 4, 2, 5, 3]), greedy(10)
    expected = expect("mixtral", prompts, params)
    llm, seen = load(tiny_checkpoint("mixtral", **LONG), **WIDE, overlap=plan)
    with llm:
        executor = llm.engine.executor
        launch, launched = executor.launch, itertools.count()
        ring = StagingRing(1, CPU)
        ring.release = lambda guard: None  # type: ignore[method-assign]

        def without_guards(*arguments: Any) -> None:
            if next(launched) == 3:
                executor._ring = ring
                delay_lanes(llm, 0.02)
            launch(*arguments)

        executor.launch = without_guards  # type: ignore[method-assign]
        try:
            told = differences(answers_of(generate(llm, prompts, params)), expected)
        except ValueError as error:
            told = [str(error)]
    assert any(trace.reason is Reason.PLANNED for trace in seen.traces)
    assert told != []


class Poison:
    """Pages that nobody may read hold NaN: those never written to, those freed, those evicted.

    Attributes:
        num_freed: Pages poisoned because they were freed.
        num_evicted: Those because they were evicted.
    """

    def __init__(self, cache: KVCache) -> None:
        self.num_freed = self.num_evicted = 0
        self._cache = cache
        pool = cache._device.pool
        release, on_evict = pool.release, pool.on_evict

        def released(pages: Any, keep: Any) -> None:
            pages = list(pages)
            release(pages, keep)
            for page in set(pages):
                if pool.references(page) == 0 and not pool.is_idle(page):
                    self.fill(page)
                    self.num_freed += 1

        def evicted(page: int) -> None:
            on_evict(page)
            self.fill(page)
            self.num_evicted += 1

        pool.release, pool.on_evict = released, evicted  # type: ignore[method-assign]
        self.fill(slice(None))

    def fill(self, pages: int | slice) -> None:
        for keys, values in self._cache.layers:
            keys[pages] = math.nan
            values[pages] = math.nan


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("mode", VALUES["mode"])
@pytest.mark.parametrize("family", VALUES["family"])
def test_no_page_is_read_before_it_was_written_or_after_it_was_freed(
    family: str,
    mode: str,
    prefix_caching: bool,
    tiny_checkpoint: MakeCheckpoint,
    expect: Callable[..., Answers],
) -> None:
    """In a pool so small that requests give way, and their pages go to others at once."""
    prompts, params = prompts_of([130, 60, 9, 17, 33, 64, 1, 15]), greedy(20)
    expected = expect(family, prompts, params)
    llm, seen = load(
        tiny_checkpoint(family, **LONG),
        async_scheduling=mode != "sync",
        overlap=mode if mode in PLANS else "off",
        kv_cache_tokens=224,
        enable_prefix_caching=prefix_caching,
    )
    with llm:
        poison = Poison(llm.engine.kv_cache)
        for _ in range(2):
            assert differences(answers_of(generate(llm, prompts, params)), expected) == []
            check_nothing_is_left(llm)
        assert llm.engine.stats.preemptions > 0
        assert poison.num_freed > 0
        assert (poison.num_evicted > 0) == prefix_caching
        assert (llm.engine.stats.prefix_hit_tokens > 0) == prefix_caching
        check_traces(llm, seen)


@pytest.mark.parametrize("mode", ["async", *PLANS])
def test_a_page_that_is_poisoned_while_it_is_in_use_shows(
    mode: str, tiny_checkpoint: MakeCheckpoint, expect: Callable[..., Answers]
) -> None:
    """The comparison above sees a read of NaN."""
    prompts, params = prompts_of([70, 60]), greedy(12)
    expected = expect("mixtral", prompts, params)
    overlap = mode if mode in PLANS else "off"
    llm, _ = load(tiny_checkpoint("mixtral", **LONG), overlap=overlap)
    with llm:
        poison, cache = Poison(llm.engine.kv_cache), llm.engine.kv_cache
        launch, launched = llm.engine.executor.launch, itertools.count()

        def spoil(*arguments: Any) -> None:
            if next(launched) == 8:
                used = [
                    page for page in range(cache.num_pages) if cache._device.pool.references(page)
                ]
                poison.fill(used[0])
            launch(*arguments)

        llm.engine.executor.launch = spoil  # type: ignore[method-assign]
        assert differences(answers_of(generate(llm, prompts, params)), expected) != []
