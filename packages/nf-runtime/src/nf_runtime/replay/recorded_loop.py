"""The loop of an engine that writes a replay log."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import astuple

from nf_runtime.iteration_output import IterationOutput
from nf_runtime.loop import IterationLoop, IterationRunner, PageTables
from nf_runtime.replay.digests import progress_digest
from nf_runtime.replay.log_format import LogEnd, Tag
from nf_runtime.replay.recorded_runner import RecordedRunner
from nf_runtime.replay.recorder import Recorder
from nf_scheduler import Progress, QueueFull, Request, Scheduler, TokenBudget


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
        self._classes = recorder.classes
        super().__init__(scheduler, pages, self._recorded, lag=lag)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._log.tag(Tag.ADD)
        self._write_request(request)
        try:
            super().add(request)
            self._tokens.took()
        except (ValueError, QueueFull):
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

    def set_budgets(self, budgets: tuple[TokenBudget, ...]) -> None:
        """Form batches by other budgets."""
        super().set_budgets(budgets)
        self._log.tag(Tag.BUDGETS)
        self._log.numbers([number for budget in budgets for number in astuple(budget)])
        self._log.flush()

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
        # Classes without a level of their own are all alike.
        log.text(request.request_class if request.request_class in self._classes else "")
        log.text(fork_of or "")
        log.seconds(math.inf if request.deadline is None else request.deadline)
