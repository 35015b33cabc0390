"""What an iteration uses of what a device can do. Torch-free."""

from __future__ import annotations

import numpy as np

from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan import DevicePeaks
from nf_runtime.pipeline.schedule import Schedule


class Utilisation:
    """Rates of iterations, and their parts of the measured peaks.

    Args:
        costs: Of nano-operations.
        peaks: Of the device; None where they were not measured.
    """

    def __init__(self, costs: NodeCosts, peaks: DevicePeaks | None) -> None:
        self._costs = costs
        self._peaks = peaks

    def of(
        self, schedule: Schedule, division: Division, contexts: np.ndarray, seconds: float
    ) -> dict[str, float]:
        """Of an iteration; the device reads and writes at least so much, and computes exactly that.

        Args:
            schedule: Of its plan.
            division: Of its batch.
            contexts: int [requests], tokens of each before the batch.
            seconds: That it took, above 0.

        Returns:
            `flops_per_second`, `bytes_per_second` of memory and, with several ranks,
            `sent_per_second`; where there are peaks, their parts as `compute`, `memory` and
            `network`.
        """
        work = self._costs.total(schedule, division, contexts)
        rates = {
            "flops_per_second": work.flops / seconds,
            "bytes_per_second": work.bytes_moved / seconds,
        }
        if work.bytes_sent:
            rates["sent_per_second"] = work.bytes_sent / seconds
        if self._peaks is None:
            return rates
        most = self._peaks.model_dump()
        names = {"flops": "compute", "bytes": "memory", "sent": "network"}
        parts = {
            names[name.removesuffix("_per_second")]: rate / most[name]
            for name, rate in rates.items()
            if most[name]
        }
        return rates | parts
