"""Whether there are pages for one more request, now and later."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nf_scheduler.page_budget import PageBudget
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence


class LengthForecast(Protocol):
    """How likely requests still run after more tokens. `OutputLengths` is one."""

    def survival(self, lengths: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """As `OutputLengths.survival`."""


class Admission:
    """Admits whoever finds pages for the tokens that it has: the base of the others.

    When pages run out later, somebody gives way.
    """

    name = "greedy"

    def begin(self, running: RunningSet, pages: PageBudget) -> None:
        """Look at the running requests, at the beginning of `schedule`."""

    def admits(self, sequence: Sequence) -> bool:
        """Whether `sequence` may be started, if there are pages for the tokens that it has."""
        return True

    def started(self, sequence: Sequence) -> None:
        """`sequence` was started."""


class ReservingAdmission(Admission):
    """Admits a request only if every one that runs could reach its `max_tokens`."""

    name = "reserve"

    def __init__(self) -> None:
        self._free = 0
        self._page_size = 1

    def begin(self, running: RunningSet, pages: PageBudget) -> None:
        """Look at the running requests."""
        slots = running.order
        self._page_size = pages.page_size
        at_end = -(-running.limit[slots] // pages.page_size) - running.shared_pages[slots]
        own = running.capacity[slots] // pages.page_size - running.shared_pages[slots]
        self._free = pages.num_available - int((at_end - own).sum())

    def admits(self, sequence: Sequence) -> bool:
        """Whether `sequence` fits beside all others at their longest."""
        return self._pages_of(sequence) <= self._free

    def started(self, sequence: Sequence) -> None:
        """`sequence` was started."""
        self._free -= self._pages_of(sequence)

    def _pages_of(self, sequence: Sequence) -> int:
        request = sequence.request
        return -(-(request.prompt_len + request.max_tokens) // self._page_size)


class PredictedPeak(Admission):
    """Admits a request while the predicted peak of pages in use fits.

    Looks at a number of moments ahead. A request that runs now is in use of its pages then with the
    probability that its answer goes on for so long. The sum over all requests has a mean and a
    standard deviation; the peak is the greatest value of the mean and `deviations` times the
    latter, which is a high quantile of a sum of many independent parts. Predicting too little ends
    in somebody giving way.

    Args:
        lengths: how likely answers go on.
        max_tokens: longest possible answer.
        deviations: standard deviations to leave room for.
    """

    name = "predict"

    def __init__(
        self, lengths: LengthForecast, max_tokens: int, *, deviations: float = 2.0
    ) -> None:
        self._lengths = lengths
        self._deviations = deviations
        self._ahead = _moments(max_tokens)
        self._mean = np.zeros(len(self._ahead))
        self._variance = np.zeros(len(self._ahead))
        self._num_pages = 0
        self._page_size = 1

    @property
    def peak(self) -> float:
        """Pages that are predicted to be in use at the peak, as of the last look."""
        return float(self._quantile(self._mean, self._variance).max())

    def begin(self, running: RunningSet, pages: PageBudget) -> None:
        """Predict the use of the requests that run."""
        slots = running.order
        self._num_pages, self._page_size = pages.num_pages, pages.page_size
        tokens = running.known[slots] + running.pending[slots]
        use, alive = self._predict(
            tokens,
            tokens - running.prompt_len[slots],
            running.limit[slots] - tokens,
            running.capacity[slots] // pages.page_size,
            running.shared_pages[slots],
        )
        others = pages.num_pages - pages.num_available - int(use[:, 0].sum())
        self._mean = (alive * use).sum(axis=0) + others
        self._variance = (alive * (1.0 - alive) * use * use).sum(axis=0)

    def admits(self, sequence: Sequence) -> bool:
        """Whether the predicted peak fits with `sequence`."""
        mean, variance = self._candidate(sequence)
        peak = self._quantile(self._mean + mean, self._variance + variance).max()
        return bool(peak <= self._num_pages)

    def started(self, sequence: Sequence) -> None:
        """Add `sequence` to what is predicted."""
        mean, variance = self._candidate(sequence)
        self._mean += mean
        self._variance += variance

    def _quantile(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Pages that are hardly ever exceeded, by moment."""
        pages: np.ndarray = mean + self._deviations * np.sqrt(variance)
        return pages

    def _candidate(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the pages that `sequence` would use, by moment."""
        request = sequence.request
        tokens = np.array([sequence.num_tokens])
        length = np.array([len(sequence.output)])
        none = np.zeros(1, dtype=np.int64)
        use, alive = self._predict(tokens, length, request.max_tokens - length, none, none)
        return (alive * use)[0], (alive * (1.0 - alive) * use * use)[0]

    def _predict(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        rest: np.ndarray,
        held: np.ndarray,
        shared: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What n requests use at m moments if they run then, and how likely they do.

        One that reaches its limit between two moments counts at the later one, with what it has in
        the end.

        Args:
            tokens: [n], of prompt and answer.
            lengths: [n], of the answer.
            rest: [n], tokens until the answer reaches its limit.
            held: [n], pages they have.
            shared: [n], those of them that would be in use without them.
        """
        ahead = np.minimum(self._ahead[None, :], rest[:, None])
        use = -(-(tokens[:, None] + ahead) // self._page_size)
        use = np.maximum(use, held[:, None]) - shared[:, None]
        alive = self._lengths.survival(lengths, self._ahead)
        before = np.concatenate(([-1], self._ahead[:-1]))
        return use, np.where(before[None, :] < rest[:, None], alive, 0.0)


def _moments(longest: int) -> np.ndarray:
    """Numbers of tokens ahead to look at: 0, and from 8 on each a quarter more than the last."""
    steps = [0]
    while steps[-1] < longest:
        steps.append(max(8, steps[-1] * 5 // 4))
    return np.array(steps, dtype=np.int64)
