"""Measures plans beside each other, on made-up batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from nf_runtime.device_peaks import DevicePeaks, measure_peaks
from nf_runtime.engine import Engine
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Choice, Reason
from nf_runtime.sampler import RequestSampling
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.timeline import IterationTrace
from nf_scheduler import Batch


class Load(NamedTuple):
    """A batch.

    Attributes:
        decodes: Requests with one new token each.
        context: Tokens of each of them before it.
        prefill: New tokens of one more request, which has none before; 0: there is none.
    """

    decodes: int
    context: int
    prefill: int

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.decodes + self.prefill


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan beside the sequential one, iteration by iteration in turns.

    Attributes:
        plan: Its name.
        load: The batch.
        gain: Median of the sequential plan's time by this one's, from the first operation's start
            to the last one's end.
        quartiles: Of the same.
        wall_ms: Median of that time.
        seconds: Median of a whole iteration, from launch to result.
        concurrency: Median of the sum of all operations' times by that time.
        compute: Median part of the measured peak of products that was used.
        memory: Median part of the measured peak of reading that was used.
        traces: Of its iterations.
    """

    plan: str
    load: Load
    gain: float
    quartiles: tuple[float, float]
    wall_ms: float
    seconds: float
    concurrency: float
    compute: float
    memory: float
    traces: tuple[IterationTrace, ...]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of iterations one after the other."""
        return self.load.tokens / self.seconds


class Probe:
    """Runs batches on the executor of an engine that has nothing to do.

    Args:
        engine: Whose requests have all ended.

    Attributes:
        peaks: What its device can do at most.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.has_work:
            raise RuntimeError("the engine has requests; let them end first")
        self._engine = engine
        self._executor = engine.executor
        self._names: list[str] = []
        self._iteration = 1 << 40  # no number that the engine's scheduler comes to
        self.peaks: DevicePeaks = engine.executor.measure(measure_peaks)
        self._costs: NodeCosts = engine.node_costs()

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
        """
        sequential = self._executor.policy.sequential
        asked = [sequential, *plans]
        traces: list[list[IterationTrace]] = [[] for _ in asked]
        seconds: list[list[float]] = [[] for _ in asked]
        for plan in asked:
            self.run(plan, load)  # compiled, and every page touched
        for turn in range(rounds):
            for i in np.roll(np.arange(len(asked)), turn).tolist():
                trace, duration = self.run(asked[i], load)
                traces[i].append(trace)
                seconds[i].append(duration)
            progress()
        return [
            self._measured(asked[i].name, load, traces[i], traces[0], seconds[i])
            for i in range(len(asked))
        ]

    def run(self, plan: Plan, load: Load) -> tuple[IterationTrace, float]:
        """Run a batch by a plan; how it ran, and its seconds from launch to result."""
        batch, page_tables = self._make(load)
        started = time.perf_counter()
        trace = self._executor.trace(batch, page_tables, Choice(plan, Reason.PLANNED))
        return trace, time.perf_counter() - started

    def close(self) -> None:
        """Forget the made-up requests."""
        for name in self._names:
            self._engine.sampler.remove(name)
        self._names.clear()

    def _make(self, load: Load) -> tuple[Batch, np.ndarray]:
        """A batch, and pages for it that no two requests share."""
        info = self._engine.info
        requests = load.decodes + (load.prefill > 0)
        new = np.array([1] * load.decodes + [load.prefill] * (load.prefill > 0))
        contexts = np.array([load.context] * load.decodes + [0] * (load.prefill > 0))
        pages = -(-(contexts + new) // info.page_size)
        if pages.sum() > info.num_pages:
            raise ValueError(
                f"load has {load.decodes} decodes at {load.context} tokens and a prefill of "
                f"{load.prefill}: {pages.sum()} pages, and the KV cache has {info.num_pages}; "
                f"lower them, or raise kv_cache_tokens"
            )
        config = self._engine.config
        longest = int((contexts + new).max(initial=0))
        for name, value, most in (
            ("tokens", load.tokens, config.batch_tokens),
            ("requests", requests, config.max_num_seqs),
            ("tokens of a request", longest, info.max_model_len),
        ):
            if value > most:
                raise ValueError(f"load has {value} {name}; the engine takes at most {most}")
        while len(self._names) < requests:
            name = f"probe-{len(self._names)}"
            nothing = np.zeros(0, dtype=np.int32)
            params = SamplingParams(temperature=0.0)
            self._engine.sampler.add(name, RequestSampling(params, 0, nothing, frozenset()))
            self._names.append(name)
        starts = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
        tables = np.zeros((requests, int(pages.max())), dtype=np.int32)
        first = 0
        for row, count in enumerate(pages.tolist()):
            tables[row, :count] = np.arange(first, first + count)
            first += count
        self._iteration += 1
        batch = Batch(
            iteration=self._iteration,
            request_ids=self._names[:requests],
            slots=np.arange(requests, dtype=np.int32),
            num_decodes=load.decodes,
            query_start=starts,
            context_lens=contexts.astype(np.int32),
            token_ids=(np.arange(load.tokens) % info.vocab_size).astype(np.int32),
            samples=np.ones(requests, dtype=bool),
        )
        return batch, tables

    def _measured(
        self,
        plan: str,
        load: Load,
        traces: list[IterationTrace],
        sequential: list[IterationTrace],
        seconds: list[float],
    ) -> Measured:
        ratios = [one.wall_ns / own.wall_ns for one, own in zip(sequential, traces, strict=True)]
        work = self._costs.total(traces[0].schedule, traces[0].division, traces[0].contexts)
        wall = median(trace.wall_ns for trace in traces) * 1e-9
        low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
        return Measured(
            plan=plan,
            load=load,
            gain=median(ratios),
            quartiles=(low, high),
            wall_ms=wall * 1e3,
            seconds=median(seconds),
            concurrency=median(trace.concurrency for trace in traces),
            compute=work.flops / wall / self.peaks.flops_per_second,
            memory=work.bytes_moved / wall / self.peaks.bytes_per_second,
            traces=tuple(traces),
        )
