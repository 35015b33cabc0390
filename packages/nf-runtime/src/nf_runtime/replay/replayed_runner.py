"""Runs no iterations: compares them with a log, and gives what the log says they gave."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from nf_runtime.iteration_output import IterationOutput
from nf_runtime.replay.digests import batch_digest, pages_digest
from nf_runtime.replay.log_cursor import DivergenceError, LogCursor
from nf_runtime.replay.log_format import Tag
from nf_scheduler import Batch, IterationResult

if TYPE_CHECKING:
    from nf_kvcache import IterationOffload


class IterationFailedError(Exception):
    """An iteration fails, because the log says it did."""


class ReplayedRunner:
    """Stands for the executor of the engine that wrote a log.

    Args:
        cursor: Where the log is read.
        with_tokens: Whether the log has the real tokens.

    Attributes:
        batch: The one launched last.
        num_launched: Iterations that were the same so far.
    """

    def __init__(self, cursor: LogCursor, *, with_tokens: bool) -> None:
        self.batch: Batch | None = None
        self.num_launched = 0
        self._cursor = cursor
        self._with_tokens = with_tokens
        self._in_flight: deque[Batch] = deque()

    def launch(
        self, batch: Batch, page_tables: np.ndarray, offload: "IterationOffload | None" = None
    ) -> None:
        """Compare an iteration.

        Raises:
            DivergenceError: It is another one than that of the log.
            IterationFailedError: It could not be launched.
        """
        log = self._cursor.expect(Tag.LAUNCH, f"the launch of iteration {batch.iteration}")
        sizes, logged = [len(batch), batch.num_decodes, batch.num_tokens], log.numbers()
        batch_logged, pages_logged = log.word(), log.word()
        if sizes != logged:
            raise DivergenceError(
                f"iteration {batch.iteration} has {_sizes(sizes)}, and in the log {_sizes(logged)}"
            )
        if batch_digest(batch, with_tokens=self._with_tokens) != batch_logged:
            raise DivergenceError(
                f"iteration {batch.iteration} has other rows than in the log, or of other requests,"
                f" though as many: {_sizes(sizes)}"
            )
        if pages_digest(page_tables) != pages_logged:
            raise DivergenceError(
                f"iteration {batch.iteration} has the requests and rows of the log, and other pages"
            )
        if self._cursor.comes(Tag.UNLAUNCHED):
            raise IterationFailedError
        self.batch = batch
        self.num_launched += 1
        self._in_flight.append(batch)

    def poll(self) -> IterationOutput:
        """What the oldest iteration gave.

        Raises:
            IterationFailedError: It failed.
        """
        if self._cursor.comes(Tag.FAILED):
            raise IterationFailedError
        log = self._cursor.expect(Tag.RESULT, "the tokens of an iteration")
        batch = self._in_flight.popleft()
        token_ids = np.zeros(len(batch), dtype=np.int32)
        if self._with_tokens:
            token_ids[batch.samples] = log.array()
        else:
            for _ in range(log.number()):
                row = log.number()
                token_ids[row] = log.word()
        return IterationOutput(IterationResult(batch.iteration, token_ids), {}, {})

    def drain(self) -> None:
        """Forget what was launched."""
        self._in_flight.clear()


def _sizes(numbers: list[int]) -> str:
    requests, decodes, tokens = numbers
    return f"{requests} requests ({decodes} decodes) with {tokens} tokens"
