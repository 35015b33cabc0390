"""What is held of the cells of the feature matrix, and of engines that ran like them."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from feature_cells import (
    HELD_BACK,
    NEW_TOKENS,
    PROMPTS,
    STOPS_AT,
    TOKEN_BUDGET,
    Answers,
    Cell,
    Seen,
    answers_of,
    crowd_out,
    differences,
    generate,
    load,
    reference_of,
    sampling_params,
)

from nf_runtime import LLM, RequestOutput
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.policy import Reason


@dataclass(frozen=True)
class References:
    """What the references of cells answer, each asked once.

    Attributes:
        checkpoint: Gives the model of a family.
        directory: For what no reference has: an SSD.
    """

    checkpoint: Callable[[str], Path]
    directory: Path
    known: dict[Cell, Answers] = field(default_factory=dict)

    def of(self, cell: Cell) -> tuple[Answers, Answers]:
        """What the reference of a cell answers, and what that answers greedily."""
        greedy = self._answers(replace(cell, sampling="greedy"), None)
        return self._answers(cell, greedy), greedy

    def _answers(self, cell: Cell, greedy: Answers | None) -> Answers:
        plain = reference_of(cell)
        if plain not in self.known:
            options = plain.options(self.directory) | {"max_num_batched_tokens": 512}
            llm, _ = load(self.checkpoint(plain.family), **options)
            with llm:
                outputs = generate(llm, PROMPTS, sampling_params(plain.sampling, greedy))
                ledgers = [output.outputs[0].ledger for output in outputs]
                chunks = [ledger and ledger.prefill_chunks for ledger in ledgers]
                assert chunks == [1] * len(PROMPTS)
                assert llm.engine.stats.preemptions == 0
            self.known[plain] = answers_of(outputs)
        return self.known[plain]


def run_cell(cell: Cell, directory: Path, references: References) -> None:
    """Run a cell with an SSD in a directory, and hold all of it."""
    expected, greedy = references.of(cell)
    path = references.checkpoint(cell.family)
    check_sampling(cell, expected, greedy)
    params = sampling_params(cell.sampling, greedy)
    before = Open.now()
    llm, seen = load(path, **cell.options(directory))
    with llm:
        outputs = generate(llm, PROMPTS, params)
        assert differences(answers_of(outputs), expected) == []
        check_chunks(cell, seen, outputs)
        check_mode(cell, llm)
        assert (llm.engine.stats.preemptions > 0) == (cell.pool == "small pool"), "preemptions"
        check_nothing_is_left(llm)
        if cell.prefix == "cache":
            if cell.tier != "device":
                assert llm.engine.kv_cache.flush(10)
                crowd_out(llm)
            again = generate(llm, PROMPTS, params)
            assert differences(answers_of(again), expected) == []
            check_nothing_is_left(llm)
        check_hits(cell, llm)
        check_traces(llm, seen)
    if cell.tier == "host and SSD":
        llm, seen = load(path, **cell.options(directory))
        with llm:
            assert differences(answers_of(generate(llm, PROMPTS, params)), expected) == []
            assert llm.engine.stats.prefix_hit_tokens_by_tier["disk"] > 0, "hits on the SSD"
            check_nothing_is_left(llm)
            check_traces(llm, seen)
    before.check(directory)


def check_nothing_is_left(llm: LLM) -> None:
    """All pages are free, no request lives, and what is kept twice agrees."""
    engine = llm.engine
    engine.scheduler.check_integrity()
    engine.kv_cache.check_integrity()
    cache = engine.kv_cache.stats()
    assert cache.pages_used == 0
    assert cache.pages_free + cache.pages_cached == cache.pages_total
    if not engine.config.enable_prefix_caching:
        assert cache.pages_cached == 0
    assert engine.kv_cache.num_available == engine.kv_cache.num_pages
    assert not engine.has_work
    assert engine.loop.num_in_flight == 0
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_restoring) == (0, 0, 0)


_without_races: set[bytes] = set()


def check_traces(llm: LLM, seen: Seen) -> None:
    """No iteration raced, by vector clocks. What has been looked at before is not again."""
    executor = llm.engine.executor
    for trace in seen.traces:
        schedule, division = trace.schedule, trace.division
        digest = hashlib.sha256(repr((executor.workspace, schedule.graph, division)).encode())
        for array in (
            schedule.nodes,
            *schedule.commands,
            division.segment_request,
            division.segment_start,
            trace.contexts,
        ):
            digest.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
        if digest.digest() not in _without_races:
            assert find_races(schedule, division, executor.workspace, trace.contexts) == []
            _without_races.add(digest.digest())


def check_chunks(cell: Cell, seen: Seen, outputs: Sequence[RequestOutput]) -> None:
    """Prompts came in chunks of the right size, and in as many as that takes."""
    if cell.chunk is None:
        assert 64 < seen.largest_chunk <= TOKEN_BUDGET
    else:
        assert seen.largest_chunk == cell.chunk, "largest chunk"
    cut = 0
    for output in outputs:
        ledger = output.outputs[0].ledger
        assert ledger is not None
        computed = ledger.prompt_tokens - ledger.cached_tokens
        assert ledger.prefill_chunks >= math.ceil(computed / (cell.chunk or TOKEN_BUDGET))
        cut += ledger.prefill_chunks > 1
    assert cut > 0


def check_mode(cell: Cell, llm: LLM) -> None:
    """Iterations were formed ahead, and ran by the plan, where that is asked for."""
    stats = llm.engine.stats
    assert (stats.iterations_ahead > 0) == (cell.mode != "sync"), "iterations ahead"
    overlap_steps = stats.overlap_steps
    if cell.has_several_lanes:
        assert overlap_steps.get(cell.mode, {}).get(Reason.PLANNED, 0) > 0, "planned steps"
    else:
        assert overlap_steps.keys() == {"sequential"}, "planned steps"


def check_hits(cell: Cell, llm: LLM) -> None:
    """Prefixes were found where they were to be found."""
    stats = llm.engine.stats
    assert (stats.prefix_hit_tokens > 0) == (cell.prefix == "cache"), "hits"
    in_host = stats.prefix_hit_tokens_by_tier["host"]
    assert (in_host > 0) == (cell.tier != "device"), "hits in the host"


def check_sampling(cell: Cell, answers: Answers, greedy: Answers) -> None:
    """The way of sampling has changed what it is there to change."""
    if cell.sampling == "greedy":
        assert answers == greedy
    elif cell.sampling == "logprobs":
        assert [answer.token_ids for answer in answers] == [a.token_ids for a in greedy]
        assert all(len(answer.logprobs or ()) == NEW_TOKENS for answer in answers)
        assert [i for i, answer in enumerate(answers) if answer.prompt_logprobs] == [2]
    elif cell.sampling == "stop":
        for number, (answer, other) in enumerate(zip(answers, greedy, strict=True)):
            if number % 2:
                assert (answer.finish_reason, answer.stop_reason) == ("stop", answer.token_ids[-1])
                assert answer.token_ids == other.token_ids[: len(answer.token_ids)]
                assert len(answer.token_ids) <= STOPS_AT + 1
            else:
                assert answer.token_ids != other.token_ids
                assert len(answer.token_ids) > HELD_BACK
    else:
        assert all(
            answer.token_ids != other.token_ids
            for answer, other in zip(answers, greedy, strict=True)
        )


@dataclass(frozen=True)
class Open:
    """What this process has open."""

    threads: frozenset[str]
    files: frozenset[str]

    @classmethod
    def now(cls) -> "Open":
        return cls(frozenset(os.listdir("/proc/self/task")), frozenset(os.listdir("/proc/self/fd")))

    def check(self, directory: Path, *, patience: float = 10) -> None:
        """Nothing is open that was not before: threads, files, and none in a directory.

        A thread that was joined may be listed a moment longer: so many seconds at most.
        """
        deadline = time.monotonic() + patience
        while (more := Open.now().threads - self.threads) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not more, "threads are left"
        now = Open.now()
        assert len(now.files) <= len(self.files), "files are open"
        targets = [os.path.realpath(f"/proc/self/fd/{number}") for number in now.files]
        assert not [target for target in targets if target.startswith(str(directory))]
