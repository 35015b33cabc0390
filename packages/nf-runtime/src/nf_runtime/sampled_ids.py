"""The ids that were sampled last, which stay on the device: the next iteration reads them there."""

import torch
from torch import Tensor

from nf_kernels.ops import OperationSet
from nf_runtime.graph import BatchInput
from nf_runtime.staging import Arrays


class SampledIds:
    """The last id of each slot.

    Args:
        operations: That write and read them.
        max_requests: Number of slots.
        device: Where they are.
    """

    def __init__(
        self, operations: OperationSet, *, max_requests: int, device: torch.device
    ) -> None:
        self._operations = operations
        self._last = torch.zeros(max_requests, dtype=torch.int64, device=device)

    def feed(self, arrays: Arrays) -> None:
        """Write them where token ids of a batch are not known (-1), by its `slot_of_row`."""
        self._operations["feed_sampled"](
            token_ids=arrays.on_device(BatchInput.TOKEN_IDS.name),
            slots=arrays.on_device("slot_of_row"),
            last_sampled=self._last,
        )

    def keep(self, sampled: Tensor, arrays: Arrays) -> None:
        """Take what was sampled, int64 [S], by the batch's `sample_slots`."""
        self._operations["keep_sampled"](
            sampled=sampled, slots=arrays.on_device("sample_slots"), last_sampled=self._last
        )
