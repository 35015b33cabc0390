"""What one iteration computed. Torch-free."""

from dataclasses import dataclass

from nf_runtime.logprobs import RowLogprobs
from nf_scheduler import IterationResult


@dataclass(frozen=True, slots=True)
class IterationOutput:
    """What one iteration computed.

    Attributes:
        result: Sampled ids, for the scheduler.
        logprobs: By request, of its sampled token.
        prompt_logprobs: By request, of the prompt tokens that follow this iteration's positions,
            and the first of these positions.
    """

    result: IterationResult
    logprobs: dict[str, RowLogprobs]
    prompt_logprobs: dict[str, tuple[int, list[RowLogprobs]]]
