"""What overlap gains, measured while requests are served. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Choice, Reason

_WEIGHT = 0.2  # of a new measurement
_Bucket = tuple[int, int]
_Key = TypeVar("_Key")


class OverlapGain:
    """Time of sequential iterations by that of overlapped ones with batches alike.

    After an overlapped iteration that was timed, the next one of a batch alike runs sequentially,
    and is timed as well.
    """

    def __init__(self) -> None:
        self._wanted: set[_Bucket] = set()
        self._sequential: dict[_Bucket, float] = {}  # ns per token
        self._overlapped: dict[tuple[str, _Bucket], float] = {}

    def revise(self, choice: Choice, sequential: Plan, tokens: int, decodes: int) -> Choice:
        """The choice itself, or the sequential plan where that is to be measured now."""
        bucket = _bucket(tokens, decodes)
        if choice.plan.is_sequential or bucket not in self._wanted:
            return choice
        self._wanted.discard(bucket)
        return Choice(sequential, Reason.REFERENCE)

    def add(self, plan: Plan, reason: Reason, tokens: int, decodes: int, wall_ns: int) -> None:
        """Take a timed iteration.

        Args:
            plan: By which it ran.
            reason: Why it ran so.
            tokens: Of its batch.
            decodes: So many of them.
            wall_ns: How long it took.
        """
        bucket = _bucket(tokens, decodes)
        if reason is Reason.REFERENCE:
            _blend(self._sequential, bucket, wall_ns / tokens)
        elif reason is Reason.PLANNED and not plan.is_sequential:
            _blend(self._overlapped, (plan.name, bucket), wall_ns / tokens)
            self._wanted.add(bucket)

    def of(self, tokens: int, decodes: int, wall_ns: int) -> float | None:
        """Time of a sequential iteration with such a batch by that of another; None: not known."""
        per_token = self._sequential.get(_bucket(tokens, decodes))
        return None if per_token is None or not wall_ns else per_token * tokens / wall_ns

    def ratios(self) -> Mapping[str, float]:
        """For each plan, the mean over its batches; above 1 overlap is faster."""
        found: dict[str, list[float]] = {}
        for (mode, bucket), time in self._overlapped.items():
            if bucket in self._sequential:
                found.setdefault(mode, []).append(self._sequential[bucket] / time)
        return {mode: sum(ratios) / len(ratios) for mode, ratios in found.items()}


def _bucket(tokens: int, decodes: int) -> _Bucket:
    """Batches alike: within a factor of 2 in tokens, and a quarter in the share of decodes."""
    return tokens.bit_length(), 4 * decodes // tokens


def _blend(values: dict[_Key, float], key: _Key, value: float) -> None:
    known = values.get(key)
    values[key] = value if known is None else known + _WEIGHT * (value - known)
