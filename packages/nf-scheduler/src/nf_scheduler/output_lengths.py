"""How long answers get, learned from those that were given."""

from __future__ import annotations

import numpy as np

_BIN = 16  # tokens that one estimate covers
_PRIOR_REQUESTS = 4.0  # what is assumed of every length counts as much as so many requests
_PRIOR_MEAN = 512.0  # tokens
_MEMORY = 8192.0  # requests that are remembered; older ones count for less and less


class OutputLengths:
    """A running estimate of the length of answers: how likely one of so many tokens goes on.

    The product-limit estimate (Kaplan and Meier, 1958): for every length, of those that got so far,
    how many ended there of their own accord. Those that are still running, were aborted or reached
    their `max_tokens` tell that they got so far, and nothing else; a mean over finished answers
    would be too low as long as the long ones are still running. Of a length that nothing is known
    of, it is assumed that answers go on as if they had 512 tokens on average.

    Args:
        max_tokens: longest possible answer.
    """

    def __init__(self, max_tokens: int) -> None:
        bins = max_tokens // _BIN + 2
        self._reached = np.zeros(bins)  # requests that got to the first token of the bin
        self._ended = np.zeros(bins)  # of these, those that ended in it
        self._log_survival: np.ndarray | None = None  # from the first bin to the start of each

    @property
    def num_observed(self) -> float:
        """Requests that the estimate rests on; old ones count for less."""
        return float(self._reached[0])

    def observe_tokens(self, lengths: np.ndarray) -> None:
        """Some running answers have just grown to these numbers of tokens, int32 [n], each >= 1."""
        entered = lengths[(lengths - 1) % _BIN == 0] // _BIN
        if entered.size:
            np.add.at(self._reached, entered, 1.0)
            self._log_survival = None
            if self._reached[0] > 2 * _MEMORY:
                self._reached *= 0.5
                self._ended *= 0.5

    def observe_end(self, length: int) -> None:
        """An answer ended of its own accord with so many tokens."""
        self._ended[(length - 1) // _BIN] += 1.0
        self._log_survival = None

    def survival(self, lengths: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """How likely answers go on for more tokens.

        Args:
            lengths: integers [n], tokens so far.
            ahead: integers [m], tokens more.

        Returns:
            float64 [n, m], each the probability that an answer of `lengths` tokens gets to
            `lengths + ahead`, if nothing but itself ends it.
        """
        curve = self._curve()
        last = len(curve) - 1
        bins = np.minimum((lengths[:, None] + ahead[None, :]) // _BIN, last)
        begin = np.minimum(lengths // _BIN, last)
        result: np.ndarray = np.exp(curve[bins] - curve[begin][:, None])
        return result

    def mean(self, length: int, limit: int) -> float:
        """Tokens that an answer of `length` tokens is expected to have in the end.

        Args:
            length: tokens so far.
            limit: its max_tokens.
        """
        ahead = np.arange(0, max(limit - length, 0), _BIN)
        survival = self.survival(np.array([length]), ahead)[0]
        steps = np.minimum(_BIN, limit - length - ahead)
        return length + float(survival @ steps)

    def quantile(self, level: float, limit: int) -> int:
        """Tokens that a share of `level` of all answers do not exceed.

        Args:
            level: in (0, 1).
            limit: their max_tokens.
        """
        reached = np.exp(self._curve()) > 1.0 - level
        beyond = int(np.argmin(reached)) if not reached.all() else len(reached)
        return min(beyond * _BIN, limit)

    def _curve(self) -> np.ndarray:
        """Logarithm of the probability to get to the start of each bin."""
        if self._log_survival is None:
            assumed = _PRIOR_REQUESTS * _BIN / _PRIOR_MEAN
            hazard = (self._ended + assumed) / (self._reached + _PRIOR_REQUESTS)
            steps = np.log1p(-np.minimum(hazard, 0.999))  # nobody is certain to end
            self._log_survival = np.concatenate(([0.0], np.cumsum(steps)[:-1]))
        return self._log_survival
