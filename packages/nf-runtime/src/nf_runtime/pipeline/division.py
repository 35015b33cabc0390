"""A batch cut into nano-batches. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nf_runtime.graph import Rows
from nf_runtime.pipeline.plan import NanoBatch, Phase


@dataclass(frozen=True, slots=True)
class Structure:
    """What of a division decides over dependencies; batches alike in this share a schedule.

    Tokens are told apart by *cell*: the decodes of nano-batch i are cell 2 i, its prefill tokens
    cell 2 i + 1. Sets of cells are bits of an integer.

    Attributes:
        num_nano_batches: Of the plan, empty ones included.
        occupied: Cells with at least one token.
        context_from: For each nano-batch, the first one that has tokens of a request whose later
            tokens it has: its attention reads what that one appends. Itself, if there is none.
        has_selected: Whether logits of some rows are wanted.
    """

    num_nano_batches: int
    occupied: int
    context_from: tuple[int, ...]
    has_selected: bool = True

    def cells(self, rows: Rows, first: int, end: int) -> int:
        """The cells of a token range in the nano-batches from `first` to before `end`."""
        pairs = (1 << 2 * end) - (1 << 2 * first)
        if rows is Rows.DECODE:
            return pairs & _DECODES
        if rows is Rows.PREFILL:
            return pairs & ~_DECODES
        if rows is Rows.SELECTED:
            return self.selected
        return pairs

    def context(self, rows: Rows, first: int, end: int) -> int:
        """The cells whose keys and values attention over such rows reads."""
        if rows is Rows.DECODE:
            return self.cells(rows, first, end)
        return self.cells(rows, min(self.context_from[first:end]), end)

    @property
    def selected(self) -> int:
        """The cell of the rows whose logits are wanted."""
        return 1 << 2 * self.num_nano_batches


_DECODES = sum(1 << 2 * i for i in range(64))


@dataclass(frozen=True, slots=True)
class Division:
    """Where the nano-batches of one batch begin and end.

    A request whose chunk is cut becomes a *segment* in each of its nano-batches.

    Attributes:
        bounds: First row of each nano-batch, and the end of the last.
        num_decodes: Rows of decodes, which come first.
        segment_request: int [S], number of the prefill that each segment is of, from 0.
        segment_start: int [S + 1], first row of each segment, from 0 at the first prefill row.
        first_segment: First segment of each nano-batch, and the end of the last.
        num_selected: Rows whose logits are wanted.
        structure: See there.
    """

    bounds: tuple[int, ...]
    num_decodes: int
    segment_request: np.ndarray
    segment_start: np.ndarray
    first_segment: tuple[int, ...]
    num_selected: int
    structure: Structure

    @property
    def num_occupied(self) -> int:
        """Nano-batches with at least one token."""
        return sum(low < high for low, high in pairwise(self.bounds))

    def rows(self, rows: Rows, first: int, end: int) -> tuple[int, int]:
        """First row and end of a token range in the nano-batches from `first` to before `end`."""
        low, high = self.bounds[first], self.bounds[end]
        if rows is Rows.DECODE:
            return min(low, self.num_decodes), min(high, self.num_decodes)
        if rows is Rows.PREFILL:
            return max(low, self.num_decodes), max(high, self.num_decodes)
        return low, high

    def requests(self, rows: Rows, first: int, end: int) -> tuple[int, int]:
        """First request, or segment, and end, that attention over such rows has."""
        if rows is Rows.PREFILL:
            return self.first_segment[first], self.first_segment[end]
        return self.rows(rows, first, end)


def divide(
    nano_batches: tuple[NanoBatch, ...], num_decodes: int, prefills: np.ndarray, *, selected: int
) -> Division:
    """Cut a batch.

    Args:
        nano_batches: Of the plan.
        num_decodes: Requests with one token each, which come first.
        prefills: int [P], new tokens of each of the others, at least one.
        selected: Rows whose logits are wanted.
    """
    ends = np.cumsum(prefills)
    num_prefill = int(ends[-1]) if len(ends) else 0
    bounds = _bounds(nano_batches, num_decodes, num_prefill)
    count = len(nano_batches)
    if count == 1:
        starts = np.concatenate(([0], ends))
        occupied = (num_decodes > 0) | (num_prefill > 0) << 1
        structure = Structure(1, occupied, (0,), selected > 0)
        segments = np.arange(len(prefills))
        whole = (0, len(segments))
        return Division(bounds, num_decodes, segments, starts, whole, selected, structure)
    cuts = np.clip(np.array(bounds), num_decodes, None) - num_decodes
    starts = np.unique(np.concatenate(([0], ends, cuts)))
    requests = np.searchsorted(ends, starts[:-1], side="right")
    first_segment = np.searchsorted(starts, cuts)
    occupied = 0
    context_from = []
    for i in range(count):
        decodes = bounds[i] < min(bounds[i + 1], num_decodes)
        prefill = cuts[i] < cuts[i + 1]
        occupied |= decodes << 2 * i | int(prefill) << (2 * i + 1)
        source = i
        if prefill:
            request = requests[first_segment[i]]
            begins = ends[request] - prefills[request]
            source = int(np.searchsorted(cuts, begins, side="right")) - 1
        context_from.append(source)
    return Division(
        bounds,
        num_decodes,
        requests,
        starts,
        tuple(first_segment.tolist()),
        selected,
        Structure(count, occupied, tuple(context_from), selected > 0),
    )


def strictest_structure(nano_batches: tuple[NanoBatch, ...]) -> Structure:
    """The structure whose dependencies are all that any batch can have.

    Every nano-batch has tokens of all kinds that it may have, and one prompt goes through all.

    Args:
        nano_batches: Of the plan.
    """
    occupied = 0
    prefills = [i for i, one in enumerate(nano_batches) if one.phase is not Phase.DECODE]
    for i, one in enumerate(nano_batches):
        occupied |= (one.phase is not Phase.PREFILL) << 2 * i
        occupied |= (one.phase is not Phase.DECODE) << (2 * i + 1)
    context_from = tuple(prefills[0] if i in prefills else i for i in range(len(nano_batches)))
    return Structure(len(nano_batches), occupied, context_from)


def divide_typical(nano_batches: tuple[NanoBatch, ...]) -> Division:
    """Cut a batch of as many decodes as prompt tokens, to look at a plan.

    Args:
        nano_batches: Of the plan.
    """
    decodes = 8 * len(nano_batches)
    return divide(nano_batches, decodes, np.array([decodes]), selected=1)


def _bounds(
    nano_batches: tuple[NanoBatch, ...], num_decodes: int, num_prefill: int
) -> tuple[int, ...]:
    """First row of each nano-batch, and the end of the last."""
    bounds = [0]
    ranges = {
        Phase.ALL: (0, num_decodes + num_prefill),
        Phase.DECODE: (0, num_decodes),
        Phase.PREFILL: (num_decodes, num_decodes + num_prefill),
    }
    totals: dict[Phase, float] = {}
    for nano_batch in nano_batches:
        totals[nano_batch.phase] = totals.get(nano_batch.phase, 0.0) + nano_batch.share
    passed = dict.fromkeys(totals, 0.0)
    last = {nano_batch.phase: i for i, nano_batch in enumerate(nano_batches)}
    for i, nano_batch in enumerate(nano_batches):
        phase = nano_batch.phase
        first, end = ranges[phase]
        passed[phase] += nano_batch.share
        whole = i == last[phase]  # shares may not add up to their total in floating point
        part = 1.0 if whole else passed[phase] / totals[phase]
        bounds.append(first + round((end - first) * part))
    return tuple(bounds)
