"""When the nano-operations of an iteration started and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nf_runtime.device_stream import Moment


class NodeTimes:
    """Times that can be read once an iteration is done.

    Args:
        read: Gives int64 [N, 2], start and end of each nano-operation in ns of one clock; 0 for
            what did not run.
    """

    def __init__(self, read: Callable[[], np.ndarray]) -> None:
        self._read = read

    def read(self) -> tuple[int, np.ndarray]:
        """When the first one started, and all times since then.

        Returns:
            ns of the clock, and int64 [N, 2], start and end in ns; -1 for what did not run.
        """
        times = self._read()
        ran = times[:, 1] > 0
        result = np.full(times.shape, -1, dtype=np.int64)
        if not ran.any():
            return 0, result
        origin = times[ran, 0].min()
        result[ran] = times[ran] - origin
        return int(origin), result

    @classmethod
    def of_moments(cls, count: int, spans: Sequence[tuple[int, Moment, Moment]]) -> NodeTimes:
        """Times by moments of streams.

        Args:
            count: Nano-operations of the schedule.
            spans: Number of each that was launched, the moments before and behind it.
        """

        def read() -> np.ndarray:
            times = np.zeros((count, 2), dtype=np.int64)
            if spans:
                origin = spans[0][1]
                for number, started, ended in spans:
                    times[number] = [
                        1 + moment.nanoseconds_since(origin) for moment in (started, ended)
                    ]
            return times

        return cls(read)
