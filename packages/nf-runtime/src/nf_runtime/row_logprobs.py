"""Log-probabilities, computed on the device and read on the host when that has them."""

import torch
from torch import Tensor

from nf_runtime.logprobs import RowLogprobs


def to_host(tensor: Tensor) -> Tensor:
    """Order the copy of a tensor to the host; to be read once the device has got there."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class PendingLogprobs:
    """Log-probabilities of some positions, on their way to the host.

    Args:
        request_ids: Whose, for each of S positions.
        counts: How many of the most likely tokens to report for each.

    Attributes:
        request_ids: As given.
    """

    def __init__(self, request_ids: list[str], counts: list[int]) -> None:
        self.request_ids = request_ids
        self._counts = counts
        self._columns: list[Tensor] = []

    def compute(self, logits: Tensor, token_ids: Tensor) -> None:
        """Order their computation; to be called in the order of the device's work.

        Args:
            logits: float32 [S, V].
            token_ids: int64 [S] on the device, the token at each position.
        """
        counts = self._counts
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(1, token_ids.unsqueeze(1))
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        top, ids = logprobs.topk(min(max(counts, default=0), logits.shape[1]), dim=-1)
        self._columns = [to_host(t) for t in (token_ids, chosen.squeeze(1), ranks, ids, top)]

    def rows(self) -> list[RowLogprobs]:
        """One entry for each position; the device has got there."""
        columns = [column.tolist() for column in self._columns]
        return [
            RowLogprobs(token, logprob, rank, top_ids[:count], top_values[:count])
            for token, logprob, rank, top_ids, top_values, count in zip(
                *columns, self._counts, strict=True
            )
        ]
