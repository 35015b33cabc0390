"""Repeats the decisions of an engine from its log, without the model and without the device."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nf_kvcache import KVCache, KVLayout
from nf_kvcache.host_tier import ALIGNMENT
from nf_runtime.config import EngineConfig
from nf_runtime.errors import NanoFlowError
from nf_runtime.loop import IterationLoop
from nf_runtime.replay.digests import progress_digest
from nf_runtime.replay.log_cursor import DivergenceError, LogCursor, LogEndedError
from nf_runtime.replay.log_format import LogEnd, Tag
from nf_runtime.replay.log_reader import LogReader
from nf_runtime.replay.replayed_io import NoCopies, ReplayedDisk, ReplayedEvent
from nf_runtime.replay.replayed_runner import IterationFailedError, ReplayedRunner
from nf_runtime.replay.token_names import STOP_TOKEN, named_tokens
from nf_runtime.scheduling import make_scheduler
from nf_scheduler import Batch, Progress, QueueFull, Request, TokenBudget


@dataclass(slots=True)
class ReplayedStep:
    """What one step of the loop did.

    Attributes:
        seconds: From the beginning of the log to its end.
        batch: The iteration that it launched, if it did.
        progress: What requests gained.
        num_running: Requests that run after it.
        num_waiting: Requests that wait after it.
        pages_used: Of the device, after it.
        preemptions: Requests that gave way in it.
    """

    seconds: float
    batch: Batch | None
    progress: Progress
    num_running: int
    num_waiting: int
    pages_used: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay came to.

    Attributes:
        iterations: That were repeated.
        requests: That were added.
        refused: Those of them that the queue had no room for.
        preemptions: How often a request gave way.
        seconds: From the first entry to the last, of the engine's clock.
        end: Why the log ends; None if the replay did not come so far.
        divergence: What was different, and where; None if everything was the same.
    """

    iterations: int
    requests: int
    refused: int
    preemptions: int
    seconds: float
    end: LogEnd | None
    divergence: str | None


class Replay:
    """An engine without a model, which is told and answered what its log says.

    Scheduler, KV cache and loop are the real ones; what they decide is compared with digests in the
    log. Pages have no content here, so that a laptop has room for those of any device.

    Args:
        path: Of the log.

    Attributes:
        header: What the engine was.
        scheduler: To look at between steps.
        kv_cache: To look at between steps.

    Raises:
        NanoFlowError: It is no log, cannot be read, or holds nothing.
        DivergenceError: Something differs while scheduler and cache are made.
    """

    def __init__(self, path: str | Path) -> None:
        self._log = LogReader(Path(path))
        self.header = self._log.header
        self._cursor = LogCursor(self._log)
        try:
            self._has_tokens = bool(self.header["tokens"])
            config = EngineConfig(model=self.header["model"], **self.header["config"])
        except (KeyError, TypeError) as error:
            raise NanoFlowError(f"{path} is damaged: its header lacks {error}") from error
        self._page_size = config.page_size
        try:
            self.kv_cache = self._make_cache(config)
            self.scheduler = make_scheduler(
                config,
                self.kv_cache,
                self.header["max_model_len"],
                self._cursor.clock,
                budgets=tuple(TokenBudget(*budget) for budget in self.header.get("budgets", ())),
            )
        except (LogEndedError, EOFError) as error:
            raise NanoFlowError(f"{path} ends before the engine had started") from error
        self._runner = ReplayedRunner(self._cursor, with_tokens=self._has_tokens)
        lag = 1 if config.async_scheduling else 0
        self._loop = IterationLoop(self.scheduler, self.kv_cache, self._runner, lag=lag)
        self._started = self._cursor.time
        self._num_added = 0
        self._num_refused = 0
        self._end: LogEnd | None = None
        self._divergence: str | None = None

    @property
    def position(self) -> int:
        """How far it is in the log, bytes."""
        return self._log.position

    @property
    def report(self) -> ReplayReport:
        """What came of it so far."""
        return ReplayReport(
            iterations=self._runner.num_launched,
            requests=self._num_added,
            refused=self._num_refused,
            preemptions=self.scheduler.num_preemptions,
            seconds=self._cursor.time - self._started,
            end=self._end,
            divergence=self._divergence,
        )

    def run(self) -> ReplayReport:
        """Repeat everything, and say what came of it."""
        for _ in self.steps():
            pass
        return self.report

    def steps(self) -> Iterator[ReplayedStep]:
        """Repeat everything, step by step, to the end of the log or to where it diverges.

        Raises:
            NanoFlowError: The log is damaged.
        """
        try:
            while (tag := self._cursor.take_command()) is not Tag.END:
                if tag is Tag.ADD:
                    self._add()
                elif tag is Tag.ABORT:
                    is_alive = self._loop.abort(self._log.text())
                    self._compare(is_alive, "an abort finds its request alive, or does not")
                elif tag is Tag.BUDGETS:
                    numbers = self._log.numbers()
                    rows = zip(*(numbers[i::3] for i in range(3)), strict=True)
                    self._loop.set_budgets(tuple(TokenBudget(*row) for row in rows))
                elif tag is Tag.SYNC:
                    self._loop.sync()
                else:
                    yield self._step(tag)
            self._end = LogEnd(self._log.number())
        except LogEndedError as error:
            self._end = error.reason
        except EOFError:
            self._end = LogEnd.CUT
        except DivergenceError as error:
            self._divergence = (
                f"after {self._runner.num_launched} iterations and {self.report.seconds:.6f} s, at "
                f"byte {self.position} of the log: {error}"
            )

    def _make_cache(self, config: EngineConfig) -> KVCache:
        """The cache of the engine, with pages that have room for nothing."""
        layout = KVLayout(1, 1, 1, torch.float32, config.page_size)
        disk = None
        if self.header["has_disk"]:
            disk = ReplayedDisk(
                self._cursor,
                page_bytes=layout.bytes_per_page,
                page_size=config.page_size,
                with_tokens=self._has_tokens,
            )
        return KVCache(
            layout,
            self.header["num_pages"],
            prefix_caching=config.enable_prefix_caching,
            host_bytes=self.header["host_pages"]
            * -(-layout.bytes_per_page // ALIGNMENT)
            * ALIGNMENT,
            disk=disk,
            copier=NoCopies(self._cursor),
            watch=lambda event: ReplayedEvent(self._cursor),
            restore_seconds=self.header["restore_seconds"],
            clock=self._cursor.clock,
        )

    def _add(self) -> None:
        request = self._read_request()
        self._num_added += 1
        try:
            self._loop.add(request)
        except (ValueError, QueueFull) as error:
            self._num_refused += 1
            if self._log.next_tag() not in (Tag.REFUSED, Tag.END, None):
                raise DivergenceError(
                    f"request {request.request_id!r} is refused, which it was not: {error}"
                ) from error
            self._cursor.expect(Tag.REFUSED, "whether a request is refused")
        else:
            if self._cursor.comes(Tag.REFUSED):
                raise DivergenceError(f"request {request.request_id!r} is taken, and was refused")

    def _step(self, tag: Tag) -> ReplayedStep:
        """Have the loop do what it did."""
        self._runner.batch = None
        preemptions = self.scheduler.num_preemptions
        do: dict[Tag, Callable[[], Progress]] = {
            Tag.STEP: lambda: self._loop.step()[0],
            Tag.SETTLE: lambda: self._loop.settle()[0],
            Tag.FAIL: self._loop.fail,
        }
        progress = Progress()
        try:
            progress = do[tag]()
        except (DivergenceError, LogEndedError, EOFError, NanoFlowError):
            raise
        except IterationFailedError:
            pass  # the loop is told to `fail` next
        except Exception as error:
            # A fault of scheduler or cache, which the engine had as well if it failed then.
            if self._log.next_tag() is not Tag.FAIL:
                raise DivergenceError(f"a step raises {error!r}, which it did not") from error
        else:
            self._compare(progress_digest(progress), "other requests gain tokens or end")
        return ReplayedStep(
            seconds=self.report.seconds,
            batch=self._runner.batch,
            progress=progress,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            pages_used=self.kv_cache.num_pages - self.kv_cache.num_available,
            preemptions=self.scheduler.num_preemptions - preemptions,
        )

    def _compare(self, digest: int, difference: str) -> None:
        if self._cursor.expect(Tag.OUTCOME, "the end of the step").word() != digest:
            raise DivergenceError(difference)

    def _read_request(self) -> Request:
        log = self._log
        name = log.text()
        if self._has_tokens:
            prompt, stops = log.array(), frozenset(log.array().tolist())
        else:
            length = log.number()
            names = [log.word() for _ in range(length // self._page_size)]
            prompt = named_tokens(length, names, self._page_size)
            stops = frozenset((STOP_TOKEN,) if log.number() else ())
        salt, tenant = log.text(), log.text()
        max_tokens, min_tokens, reuse_prefix = log.numbers()
        priority, request_class, fork_of = log.signed(), log.text(), log.text()
        deadline = log.seconds()
        return Request(
            request_id=name,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stops,
            reuse_prefix=bool(reuse_prefix),
            cache_salt=salt,
            priority=priority,
            tenant=tenant,
            request_class=request_class,
            deadline=None if math.isinf(deadline) else deadline,
            fork_of=fork_of or None,
        )
