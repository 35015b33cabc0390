"""From measurements of plans to a plan set. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isqrt

from nf_runtime.measured import Load, Measured
from nf_runtime.pipeline.plan import Bucket, DevicePeaks, Plan, PlanSet
from nf_runtime.pipeline.plan_store import PlanTarget

_DECODES = (1, 8, 32, 128)
_CONTEXTS = (128, 1024)
_PREFILLS = (64, 256)
_DIGITS = 4  # of a share of decodes

_Range = tuple[float, float]


def default_loads(max_num_seqs: int, batch_tokens: int) -> list[Load]:
    """Decodes alone, half decodes and half a prefill, and a prefill alone.

    Args:
        max_num_seqs: Requests that run at once.
        batch_tokens: New tokens of one iteration.
    """
    most = min(max_num_seqs, batch_tokens)
    decodes = sorted({min(count, most) for count in _DECODES})
    alone = [Load(count, context, 0) for context in _CONTEXTS for count in decodes]
    mixed = [
        Load(count, context, count)
        for context in _CONTEXTS
        for count in decodes
        if count > 1 and 2 * count <= batch_tokens and count < max_num_seqs
    ]
    prefills = sorted({min(count, batch_tokens) for count in (*_PREFILLS, batch_tokens)})
    return [*alone, *mixed, *(Load(0, 0, count) for count in prefills)]


def form_plan_set(
    measured: Mapping[Load, Sequence[Measured]],
    plans: Iterable[Plan],
    target: PlanTarget,
    *,
    peaks: DevicePeaks | None = None,
) -> PlanSet:
    """The plans that were faster than the sequential one, each for batches like the measured ones.

    A bucket is of the batches around one that was measured: in tokens up to the geometric mean with
    the next one, in the share of decodes up to the middle. Batches of fewer or of more tokens than
    were measured are in none. A plan is taken if it was faster in three of four iterations (the
    lower quartile of its gain is above 1), with every context that was measured; of several the one
    with the greatest gain, in the context in which that is least. Where there is none, the bucket
    has the sequential plan: that was measured to be the best.

    Args:
        measured: Of each load, what was measured besides the sequential plan, which may be nothing.
        plans: The sequential plan, and at least all those in `measured`.
        target: What they were measured for.
        peaks: Of the device.
    """
    by_name = {plan.name: plan for plan in plans}
    sequential = next(plan for plan in by_name.values() if plan.is_sequential)
    groups: dict[float, dict[int, list[Load]]] = {}
    for load in measured:
        share = round(load.decodes / load.tokens, _DIGITS)
        groups.setdefault(share, {}).setdefault(load.tokens, []).append(load)
    buckets: list[Bucket] = []
    for share, shares in _around(sorted(groups)):
        by_tokens = groups[share]
        for tokens, bounds in _ranges(sorted(by_tokens)):
            best = _best([measured[load] for load in by_tokens[tokens]])
            name, gain = (sequential.name, None) if best is None else best
            buckets.append(Bucket(tokens=bounds, decode_share=shares, plan=name, gain=gain))
    used = {bucket.plan for bucket in buckets}
    return PlanSet(
        model=target.model,
        device=target.device,
        dtype=target.dtype,
        tensor_parallel_size=target.tensor_parallel_size,
        plans=tuple(plan for name, plan in by_name.items() if name in used),
        buckets=tuple(buckets),
        peaks=peaks,
    )


def loses(old: PlanSet, new: PlanSet) -> bool:
    """Whether a new plan set in the place of an old one would know less.

    So it is where it has fewer buckets, or none for some batches that the old one has one for.
    """
    if len(new.buckets) < len(old.buckets):
        return True
    known = [(_widened(bucket.tokens), bucket.decode_share) for bucket in new.buckets]
    return any(
        not any(_within(count, tokens) and _within(share, shares) for tokens, shares in known)
        for bucket in old.buckets
        for count in _points(_widened(bucket.tokens), [tokens for tokens, _ in known])
        for share in _points(bucket.decode_share, [shares for _, shares in known])
    )


def _widened(tokens: tuple[int, int]) -> _Range:
    """Up to where the next number begins, so that ranges of numbers that follow meet."""
    return tokens[0], tokens[1] + 1


def _within(value: float, bounds: _Range) -> bool:
    return bounds[0] <= value <= bounds[1]


def _points(within: _Range, ranges: Iterable[_Range]) -> list[float]:
    """Where ranges begin and end within one, and between: if they hold these, they hold all."""
    low, high = within
    ends = sorted({low, high, *(end for ends in ranges for end in ends if low < end < high)})
    return [*ends, *((one + other) / 2 for one, other in pairwise(ends))]


def adopted(measured: Measured) -> bool:
    """Whether a plan was faster in so many iterations that it is taken."""
    return measured.quartiles[0] > 1


def _best(contexts: Sequence[Sequence[Measured]]) -> tuple[str, float] | None:
    """Name and least gain of the best plan of all that were faster in every context."""
    gains: dict[str, list[float]] = {}
    for measured in contexts:
        for one in measured:
            if adopted(one):
                gains.setdefault(one.plan, []).append(one.gain)
    least = {name: min(all_) for name, all_ in gains.items() if len(all_) == len(contexts)}
    return max(least.items(), key=lambda item: item[1], default=None)


def _around(shares: Sequence[float]) -> list[tuple[float, tuple[float, float]]]:
    """Each share of decodes with the range of shares that it stands for."""
    middles = [round((low + high) / 2, _DIGITS) for low, high in pairwise(shares)]
    return list(zip(shares, pairwise([0.0, *middles, 1.0]), strict=True))


def _ranges(tokens: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Each number of tokens with the range that it stands for."""
    ends = [isqrt(low * high) for low, high in pairwise(tokens)] + [tokens[-1]]
    starts = [tokens[0], *(end + 1 for end in ends[:-1])]
    return list(zip(tokens, zip(starts, ends, strict=True), strict=True))
