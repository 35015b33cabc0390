"""Runs iterations, and writes down what they were and what they gave."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from nf_runtime.iteration_output import IterationOutput
from nf_runtime.loop import IterationRunner
from nf_runtime.replay.digests import batch_digest, pages_digest
from nf_runtime.replay.log_format import Tag
from nf_runtime.replay.recorder import Recorder
from nf_scheduler import Batch

if TYPE_CHECKING:
    from nf_kvcache import IterationOffload


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
