"""Runs iterations on all ranks."""

from collections.abc import Sequence

import numpy as np

from nf_kvcache import IterationOffload
from nf_kvcache.copier import Copier, Download, Event, Layer
from nf_runtime.executor import Executor
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.ranks.group import RankGroup
from nf_scheduler import Batch


class GroupRunner:
    """Has iterations run by the executors of all ranks: that of rank 0 and those it is told of.

    Whatever fails on rank 0, too, ends the group: the other ranks would wait for it for ever.

    Args:
        executor: Of rank 0; it tells the others of each iteration (`Executor.before_launch`).
        group: The other ranks.
    """

    def __init__(self, executor: Executor, group: RankGroup) -> None:
        self._executor = executor
        self._group = group

    def launch(
        self, batch: Batch, page_tables: np.ndarray, offload: IterationOffload | None = None
    ) -> None:
        """As `Executor.launch`.

        Raises:
            EngineDeadError: A rank has ended.
        """
        try:
            self._executor.launch(batch, page_tables, offload)
        except Exception as error:
            raise self._group.failure(error) from error
        except BaseException as error:  # an interrupt, with some ranks further than others
            self._group.failure(error)
            raise

    def poll(self) -> IterationOutput:
        """As `Executor.poll`.

        Raises:
            EngineDeadError: A rank has ended, or the iteration has failed.
        """
        try:
            return self._executor.poll()
        except Exception as error:
            raise self._group.failure(error) from error

    def drain(self) -> None:
        """As `Executor.drain`."""
        self._executor.drain()


class GroupCopier:
    """Copies pages from one place on the device to another, on all ranks.

    What lies below the device is rank 0's alone.

    Args:
        copier: Of rank 0.
        group: The other ranks.
    """

    def __init__(self, copier: Copier, group: RankGroup) -> None:
        self.download_seconds = 0.0
        self.upload_seconds = 0.0
        self._copier = copier
        self._group = group

    def download(
        self, layers: Sequence[Layer], pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        """As `Copier.download`; of rank 0 alone."""
        return self._copier.download(layers, pages, targets)

    def upload(
        self, layers: Sequence[Layer], pages: Sequence[int], sources: Sequence[np.ndarray]
    ) -> Event:
        """As `Copier.upload`; of rank 0 alone."""
        return self._copier.upload(layers, pages, sources)

    def duplicate(self, layers: Sequence[Layer], source: int, target: int) -> None:
        """As `Copier.duplicate`, on all ranks."""
        self._group.duplicate(source, target)
        self._copier.duplicate(layers, source, target)

    def hold(self, event: Event) -> None:
        """As `Copier.hold`."""
        self._copier.hold(event)

    def close(self) -> None:
        """As `Copier.close`."""
        self._copier.close()
