"""How long iterations take, learned from those that ran."""

from __future__ import annotations

import math

import numpy as np

_FORGETTING = 0.995  # weight of an iteration beside the next one
_LEAST_OBSERVED = 8


class IterationTimes:
    """A running least-squares fit: seconds = a + b · decodes + c · prompt tokens."""

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._num_observed = 0

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """An iteration with these parts took so long."""
        parts = np.array([1.0, num_decodes, num_prefill_tokens])
        self._products = self._products * _FORGETTING + np.outer(parts, parts)
        self._targets = self._targets * _FORGETTING + parts * seconds
        self._num_observed += 1

    def fitting_prefill(self, num_decodes: int, seconds: float) -> int:
        """Prompt tokens that an iteration with so many decodes has time for; at least 0.

        Nothing is known at first, nor of prompts before there were any: then all fit.
        """
        most = 2**31 - 1
        if math.isinf(seconds) or self._num_observed < _LEAST_OBSERVED:
            return most
        # A little of the identity, because batches that are all alike do not tell the parts apart.
        ridge = np.diag(self._products.diagonal() * 1e-6 + 1e-9)
        fixed, per_decode, per_token = np.linalg.solve(self._products + ridge, self._targets)
        if not per_token > 0:
            return most
        left = seconds - fixed - per_decode * num_decodes
        return int(min(max(left / per_token, 0.0), most))
