"""Measures plans beside each other, on made-up batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np

from nf_runtime.engine import Engine
from nf_runtime.measured import Load, Measured
from nf_runtime.pipeline.division import divide
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Choice, Reason
from nf_runtime.pipeline.utilisation import Utilisation
from nf_runtime.sampler import RequestSampling
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.timeline import IterationTrace
from nf_scheduler import Batch

_FLUSH_SECONDS = 60.0


class Probe:
    """Runs batches on the executor of an engine that has nothing to do.

    Batches have pages of the engine's KV cache, as requests have: prefixes that were there may be
    computed again afterwards.

    Args:
        engine: Whose requests have all ended.

    Attributes:
        peaks: What its device can do at most.
    """

    def __init__(self, engine: Engine) -> None:
        _require_idle(engine)
        self._engine = engine
        self._executor = engine.executor
        self._names: list[str] = []
        self._iteration = 1 << 40  # no number that the engine's scheduler comes to
        self.peaks = engine.measure_peaks()
        self.utilisation = Utilisation(engine.node_costs(), self.peaks)

    def measure(
        self,
        plans: Sequence[Plan],
        load: Load,
        *,
        rounds: int,
        progress: Callable[[], object] = lambda: None,
    ) -> list[Measured]:
        """Run a batch by each plan in turns, and by the sequential one.

        Args:
            plans: What is measured; the sequential plan is added.
            load: The batch.
            rounds: How often.
            progress: Called after each round.

        Returns:
            The sequential plan first, then each of `plans`.

        Raises:
            ValueError: The engine has no room for such a batch.
            PlanError: A plan cannot be run here.
            RuntimeError: It has requests.
        """
        for plan in plans:
            self._executor.check(plan)
        sequential = self._executor.policy.sequential
        asked = [sequential, *plans]
        traces: list[list[IterationTrace]] = [[] for _ in asked]
        seconds: list[list[float]] = [[] for _ in asked]
        with self._given_pages(load) as (batch, page_tables):
            for plan in asked:
                self._run(plan, batch, page_tables)  # compiled, and every page touched
            for turn in range(rounds):
                for i in np.roll(np.arange(len(asked)), turn).tolist():
                    trace, duration = self._run(asked[i], batch, page_tables)
                    traces[i].append(trace)
                    seconds[i].append(duration)
                progress()
        return [
            self._measured(asked[i].name, load, traces[i], traces[0], seconds[i])
            for i in range(len(asked))
        ]

    def choose(self, load: Load) -> Choice:
        """The plan by which the engine would run a batch, and why.

        Raises:
            ValueError: The engine has no room for such a batch.
        """
        return self._executor.choose(self._make(load))

    def cuts(self, plan: Plan, load: Load) -> bool:
        """Whether a plan cuts a batch in two or more."""
        prefills = np.array([load.prefill] * (load.prefill > 0), dtype=np.int64)
        division = divide(plan.nano_batches, load.decodes, prefills, selected=1)
        return division.num_occupied > 1

    def check(self, load: Load) -> None:
        """Refuse a batch that the engine has no room for.

        Raises:
            ValueError: There is no room, with what to change.
        """
        info, config = self._engine.info, self._engine.config
        if load.tokens < 1:
            raise ValueError(f"load is {load}; expected at least one decode or token of a prefill")
        pages = load.decodes * -(-(load.context + 1) // info.page_size)
        pages += -(-load.prefill // info.page_size)
        longest = max(load.prefill, (load.context + 1) * (load.decodes > 0))
        requests = load.decodes + (load.prefill > 0)
        for name, value, most, remedy in (
            ("tokens", load.tokens, config.batch_tokens, "raise max_num_batched_tokens"),
            ("requests", requests, config.max_num_seqs, "raise max_num_seqs"),
            ("tokens of a request", longest, info.max_model_len, "take a shorter context"),
            ("pages of KV", pages, info.num_pages, "raise kv_cache_tokens"),
        ):
            if value > most:
                raise ValueError(
                    f"load {load} has {value} {name}, and the engine takes at most {most}; "
                    f"{remedy}, or lower the load"
                )

    def close(self) -> None:
        """Forget the made-up requests."""
        for name in self._names:
            self._engine.sampler.remove(name)
        self._names.clear()

    def _run(
        self, plan: Plan, batch: Batch, page_tables: np.ndarray
    ) -> tuple[IterationTrace, float]:
        """Run a batch by a plan; how it ran, and its seconds from launch to result."""
        self._iteration += 1
        batch = replace(batch, iteration=self._iteration)
        started = time.perf_counter()
        trace = self._executor.trace(batch, page_tables, Choice(plan, Reason.PLANNED))
        return trace, time.perf_counter() - started

    @contextmanager
    def _given_pages(self, load: Load) -> Iterator[tuple[Batch, np.ndarray]]:
        """A batch and its page tables; nobody else has these pages meanwhile."""
        _require_idle(self._engine)
        batch, kv_cache = self._make(load), self._engine.kv_cache
        lengths = batch.context_lens + np.diff(batch.query_start)
        given: list[str] = []
        try:
            for name, length in zip(batch.request_ids, lengths.tolist(), strict=True):
                kv_cache.reserve(name, length)
                given.append(name)
            # A page that was somebody else's may be on its way to a lower tier, and would not wait.
            if not kv_cache.flush(_FLUSH_SECONDS):
                raise RuntimeError(
                    f"KV is on its way to a lower tier for more than {_FLUSH_SECONDS} s; see why, "
                    "or measure without kv_host_bytes and kv_ssd_dir"
                )
            yield batch, kv_cache.page_tables(batch.request_ids)
        finally:
            for name in given:
                kv_cache.release(name)

    def _make(self, load: Load) -> Batch:
        """A batch, whose numbers of iteration and pages are given when it is run."""
        self.check(load)
        info = self._engine.info
        requests = load.decodes + (load.prefill > 0)
        new = np.array([1] * load.decodes + [load.prefill] * (load.prefill > 0))
        contexts = np.array([load.context] * load.decodes + [0] * (load.prefill > 0))
        while len(self._names) < requests:
            name = f"probe-{len(self._names)}"
            nothing = np.zeros(0, dtype=np.int32)
            params = SamplingParams(temperature=0.0)
            self._engine.sampler.add(name, RequestSampling(params, 0, nothing, frozenset()))
            self._names.append(name)
        starts = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
        return Batch(
            iteration=self._iteration,
            request_ids=self._names[:requests],
            slots=np.arange(requests, dtype=np.int32),
            num_decodes=load.decodes,
            query_start=starts,
            context_lens=contexts.astype(np.int32),
            token_ids=(np.arange(load.tokens) % info.vocab_size).astype(np.int32),
            samples=np.ones(requests, dtype=bool),
        )

    def _measured(
        self,
        plan: str,
        load: Load,
        traces: list[IterationTrace],
        sequential: list[IterationTrace],
        seconds: list[float],
    ) -> Measured:
        ratios = [one.wall_ns / own.wall_ns for one, own in zip(sequential, traces, strict=True)]
        for trace, ratio in zip(traces, ratios, strict=True):
            trace.gain = ratio
        wall = median(trace.wall_ns for trace in traces) * 1e-9
        first = traces[0]
        used = self.utilisation.of(first.schedule, first.division, first.contexts, wall)
        low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
        return Measured(
            plan=plan,
            load=load,
            gain=median(ratios),
            quartiles=(low, high),
            wall_ms=wall * 1e3,
            seconds=median(seconds),
            concurrency=median(trace.concurrency for trace in traces),
            compute=used["compute"],
            memory=used["memory"],
            network=used.get("network"),
            traces=tuple(traces),
        )


def _require_idle(engine: Engine) -> None:
    if engine.has_work:
        raise RuntimeError("the engine has requests; let them end first")
