"""Stands where the sampler is, on ranks that are told what was sampled."""

import numpy as np
import torch
from torch import Tensor

from nf_runtime.device_stream import DeviceStream
from nf_runtime.row_logprobs import PendingLogprobs
from nf_runtime.sampler import SamplingPlan
from nf_runtime.staging import StagingBuffer
from nf_scheduler import Batch


class FollowingSampler:
    """Gives zeros, to which the executor adds the ids that rank 0 has sampled.

    Args:
        device: Of this rank.

    Attributes:
        prompt_rows: int64, rows of the next batch whose logits are wanted, as rank 0 says.
    """

    def __init__(self, device: torch.device) -> None:
        self.prompt_rows = np.empty(0, dtype=np.int64)
        self._device = device

    def plan(self, batch: Batch) -> SamplingPlan:
        """The plan of an iteration, as far as other ranks know it."""
        slots = batch.slots[np.flatnonzero(batch.samples)]
        return SamplingPlan(
            slots=slots,
            arrays={"sample_slots": slots.astype(np.int64)},
            special=[],
            prompt_spans=[],
            prompt_rows=self.prompt_rows,
        )

    def sample(
        self, logits: Tensor, plan: SamplingPlan, staged: StagingBuffer, stream: DeviceStream
    ) -> tuple[Tensor, PendingLogprobs | None]:
        """Zeros, int64 [S]."""
        return torch.zeros(len(plan.slots), dtype=torch.int64, device=self._device), None

    def prompt_logprobs(
        self, plan: SamplingPlan, logits: Tensor, stream: DeviceStream
    ) -> list[tuple[int, PendingLogprobs]]:
        """None; rank 0 computes them."""
        return []
