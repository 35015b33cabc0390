"""Writes down what an engine is told and asks, so that its decisions can be repeated."""

import contextlib
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nf_kvcache import KVCache
from nf_runtime.config import EngineConfig
from nf_runtime.errors import ModelLoadError
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.loop import IterationLoop, IterationRunner, PageTables
from nf_runtime.replay.digests import batch_digest, pages_digest, progress_digest
from nf_runtime.replay.log_format import SUFFIX, LogEnd, LogWriter, Tag
from nf_runtime.replay.recorded_io import RecordedDisk, RecordedEvent
from nf_runtime.replay.recorded_tokens import RecordedTokens
from nf_runtime.replay.token_names import TokenNames
from nf_scheduler import Batch, Progress, QueueFull, Request, Scheduler

if TYPE_CHECKING:
    from nf_kvcache import IterationOffload
    from nf_kvcache.copier import Event
    from nf_kvcache.disk_store import DiskStore

_log = logging.getLogger(__name__)
_number = itertools.count()  # of the logs that this process has begun

CONFIG_FIELDS = (
    *("policy", "service_levels", "admission", "max_num_seqs", "max_num_batched_tokens"),
    *("max_prefill_chunk", "max_num_queued_reqs", "max_num_queued_tokens", "page_size"),
    *("enable_prefix_caching", "async_scheduling"),
)
"""Fields of `EngineConfig` that decisions depend on."""


class Recorder:
    """The log of one engine, and the stand-ins for what decides what the engine does.

    Args:
        config: Where to write, how much, and whether with tokens.

    Attributes:
        log: What is written to.
        tokens: Writes prompts and answers to it.
        with_tokens: Whether as they are; else by numbers that only tell which prefixes are alike.

    Raises:
        ModelLoadError: The directory cannot be written.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.with_tokens = config.replay_log_tokens
        self.log = _open_log(str(config.replay_log_dir), config.replay_log_max_bytes)
        self._names = None if self.with_tokens else TokenNames(config.page_size)
        self.tokens = RecordedTokens(self.log, self._names)
        self._last_time = 0  # microseconds

    def clock(self) -> float:
        """Seconds, in whole microseconds."""
        now = time.monotonic_ns() // 1000
        self.log.tag(Tag.CLOCK)
        self.log.number(now - self._last_time)
        self._last_time = now
        return now * 1e-6

    def watch(self, event: "Event") -> RecordedEvent:
        """An event whose answers are written down."""
        return RecordedEvent(event, self.log)

    def disk(self, disk: "DiskStore") -> RecordedDisk:
        """A disk tier whose answers are written down."""
        return RecordedDisk(disk, self.log, self._names)

    def begin(self, config: EngineConfig, kv_cache: KVCache, max_model_len: int) -> None:
        """Write what the engine is. What was asked before that follows."""
        lower = kv_cache.stats().lower
        self.log.begin(
            {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": metadata.version("nf-runtime"),
                "model": config.model,
                "config": {name: getattr(config, name) for name in CONFIG_FIELDS},
                "max_model_len": max_model_len,
                "num_pages": kv_cache.num_pages,
                "host_pages": 0 if lower is None else lower.host_pages_total,
                "restore_seconds": kv_cache.restore_seconds,
                "has_disk": config.kv_ssd_dir is not None,
                "tokens": self.with_tokens,
            }
        )

    def close(self) -> None:
        """End the log."""
        self.log.close(LogEnd.CLOSED)


class RecordedRunner:
    """Runs iterations, and writes down digests of them and what they gave.

    Args:
        runner: The real one.
        recorder: Whose log to write.

    Attributes:
        has_raised: Whether a call has raised, which is written down as well.
    """

    def __init__(self, runner: IterationRunner, recorder: Recorder) -> None:
        self.has_raised = False
        self._runner = runner
        self._log = recorder.log
        self._tokens = recorder.tokens
        self._with_tokens = recorder.with_tokens
        self._in_flight: deque[Batch] = deque()

    def launch(
        self, batch: Batch, page_tables: np.ndarray, offload: "IterationOffload | None" = None
    ) -> None:
        """Start an iteration."""
        log = self._log
        log.tag(Tag.LAUNCH)
        log.numbers([len(batch), batch.num_decodes, batch.num_tokens])
        log.word(batch_digest(batch, with_tokens=self._with_tokens))
        log.word(pages_digest(page_tables))
        try:
            self._runner.launch(batch, page_tables, offload)
        except BaseException:
            self._note_failure(Tag.UNLAUNCHED)
            raise
        self._in_flight.append(batch)

    def poll(self) -> IterationOutput:
        """The result of the oldest iteration."""
        try:
            output = self._runner.poll()
        except BaseException:
            self._note_failure(Tag.FAILED)
            raise
        self._log.tag(Tag.RESULT)
        self._tokens.write_sampled(self._in_flight.popleft(), output.result.token_ids)
        return output

    def drain(self) -> None:
        """Wait for all that was launched, and forget it."""
        self._runner.drain()
        self._in_flight.clear()

    def _note_failure(self, tag: Tag) -> None:
        self.has_raised = True
        self._log.tag(tag)


class RecordedLoop(IterationLoop):
    """A loop that writes down what it is told, and digests of what it gives.

    Args:
        recorder: Whose log to write.
        scheduler: As `IterationLoop`, with the clock of the recorder.
        pages: As `IterationLoop`, with clock, disk and events of the recorder.
        runner: As `IterationLoop`; the real one.
        lag: As `IterationLoop`.
    """

    def __init__(
        self,
        recorder: Recorder,
        scheduler: Scheduler,
        pages: PageTables,
        runner: IterationRunner,
        *,
        lag: int,
    ) -> None:
        self._recorded = RecordedRunner(runner, recorder)
        self._log = recorder.log
        self._tokens = recorder.tokens
        super().__init__(scheduler, pages, self._recorded, lag=lag)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._log.tag(Tag.ADD)
        self._write_request(request)
        try:
            super().add(request)
        except (ValueError, QueueFull):
            self._tokens.forget(request.request_id)
            self._log.tag(Tag.REFUSED)
            raise
        finally:
            self._log.flush()

    def abort(self, request_id: str) -> bool:
        """End a request early."""
        self._log.tag(Tag.ABORT)
        self._log.text(request_id)
        is_alive = super().abort(request_id)
        self._log.tag(Tag.OUTCOME)
        self._log.word(is_alive)
        self._log.flush()
        return is_alive

    def step(self) -> tuple[Progress, IterationOutput | None]:
        """Launch the next iteration, and commit the oldest."""
        with self._command(Tag.STEP):
            progress, output = super().step()
            self._write_outcome(progress)
        return progress, output

    def settle(self) -> tuple[Progress, IterationOutput]:
        """Commit the oldest iteration in flight, and start none."""
        with self._command(Tag.SETTLE):
            progress, output = super().settle()
            self._write_outcome(progress)
        return progress, output

    def fail(self) -> Progress:
        """End the requests of all iterations in flight."""
        with self._command(Tag.FAIL):
            progress = super().fail()
            self._write_outcome(progress)
        return progress

    def sync(self) -> bool:
        """Let KV go on to the lower tiers."""
        with self._command(Tag.SYNC):
            return super().sync()

    @contextlib.contextmanager
    def _command(self, tag: Tag) -> Iterator[None]:
        """Write a command, and behind it what is asked in its course."""
        self._recorded.has_raised = False
        self._log.tag(tag)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and not self._recorded.has_raised:
                self._log.close(LogEnd.INTERRUPTED)
            raise
        finally:
            self._log.flush()

    def _write_outcome(self, progress: Progress) -> None:
        for request_id in progress.ends:
            self._tokens.forget(request_id)
        self._log.tag(Tag.OUTCOME)
        self._log.word(progress_digest(progress))

    def _write_request(self, request: Request) -> None:
        log = self._log
        fork_of = request.fork_of if self._tokens.can_fork(request) else None
        log.text(request.request_id)
        self._tokens.write_prompt(request)
        log.numbers([request.max_tokens, request.min_tokens, request.reuse_prefix])
        log.signed(request.priority)
        log.text(request.request_class)
        log.text(fork_of or "")
        log.seconds(math.inf if request.deadline is None else request.deadline)


def _open_log(directory: str, max_bytes: int) -> LogWriter:
    """Begin a log in a directory, beside those of earlier engines.

    These keep up to half of the bound; the oldest are deleted. The new one gets the other half.
    """
    folder = Path(directory)
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{moment}-{os.getpid()}-{next(_number)}{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, max_bytes // 2)
        log = LogWriter(path, max_bytes // 2)
    except OSError as error:
        raise ModelLoadError(
            f"replay_log_dir is {directory!r}, which cannot be used: {error.strerror}; name a "
            "directory that can be written"
        ) from error
    _log.info("replay log: %s", path)
    return log


def _make_room(folder: Path, max_bytes: int) -> None:
    """Delete the oldest logs, until the others together are not above a bound."""
    logs = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in logs:
        total += path.stat().st_size
        if total > max_bytes:
            path.unlink(missing_ok=True)
