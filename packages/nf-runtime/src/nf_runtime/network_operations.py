"""The operations that exchange activations between ranks, called as those of an operation set."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nf_kernels.collectives import Communicator


class NetworkOperations(Mapping[str, Callable[..., None]]):
    """Collectives by the kinds that operations of a graph have.

    All ranks call the same ones in the same order, one at a time, and on the same rows of an edge,
    which may be any range. A stream calls them when it is their turn (`DeviceStream.call`).

    Args:
        communicator: Of the ranks; nothing else calls it.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._gathered = torch.empty(0, dtype=torch.uint8, device=communicator.device)
        self._functions: dict[str, Callable[..., None]] = {
            "all_reduce": self.all_reduce,
            "all_gather": self.all_gather,
        }

    def __getitem__(self, kind: str) -> Callable[..., None]:
        return self._functions[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def all_reduce(self, *, x: Tensor, out: Tensor) -> None:
        """Add up a tensor over all ranks.

        Args:
            x: [T, D].
            out: [T, D], contiguous; may be `x` itself.
        """
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        self._communicator.all_reduce(out)

    def all_gather(self, *, x: Tensor, out: Tensor) -> None:
        """Put the columns of all ranks next to each other, in the order of the ranks.

        Args:
            x: [T, D], contiguous.
            out: [T, N * D] or narrower: the last columns, which fill up the last ranks' parts, are
                left away.
        """
        ranks, (rows, columns) = self._communicator.world_size, x.shape
        # Gathered rows lie rank by rank; what follows wants them token by token.
        needed = ranks * x.nbytes
        if self._gathered.nbytes < needed:
            self._gathered = torch.empty(needed, dtype=torch.uint8, device=x.device)
        gathered = self._gathered[:needed].view(x.dtype).view(ranks, rows, columns)
        self._communicator.all_gather(x, out=gathered.view(ranks * rows, columns))
        for rank in range(ranks):
            part = out[:, rank * columns : (rank + 1) * columns]
            part.copy_(gathered[rank, :, : part.shape[1]])
