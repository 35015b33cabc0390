"""An iteration on its way through the device."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nf_runtime.device_stream import Moment
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.node_times import NodeTimes
from nf_runtime.row_logprobs import PendingLogprobs
from nf_runtime.timeline import IterationTrace
from nf_scheduler import Batch, IterationResult


@dataclass(frozen=True, slots=True)
class LaunchedIteration:
    """An iteration whose work has been given to the device.

    Attributes:
        batch: What it runs.
        sampled: int64 [rows that sample], on its way to the host; None if there are none.
        logprobs: Of sampled tokens.
        prompt_logprobs: Of prompts, each with the position of its first row.
        done: When the device has done everything.
        trace: How it ran, and its times, if they are noted.
    """

    batch: Batch
    sampled: Tensor | None
    logprobs: PendingLogprobs | None
    prompt_logprobs: list[tuple[int, PendingLogprobs]]
    done: Moment
    trace: tuple[IterationTrace, NodeTimes] | None

    def collect(self) -> IterationOutput:
        """The result, once the device has it."""
        self.done.wait()
        self.done.check()
        token_ids = np.zeros(len(self.batch), dtype=np.int32)
        if self.sampled is not None:
            token_ids[self.batch.samples] = self.sampled.numpy()
        logprobs = {}
        if self.logprobs is not None:
            logprobs = dict(zip(self.logprobs.request_ids, self.logprobs.rows(), strict=True))
        prompt_logprobs = {
            pending.request_ids[0]: (position, pending.rows())
            for position, pending in self.prompt_logprobs
        }
        return IterationOutput(
            IterationResult(self.batch.iteration, token_ids), logprobs, prompt_logprobs
        )

    def read_trace(self) -> IterationTrace | None:
        """How it ran, once it has; None if its times were not noted."""
        if self.trace is None:
            return None
        trace, times = self.trace
        trace.start_ns, trace.times = times.read()
        return trace
