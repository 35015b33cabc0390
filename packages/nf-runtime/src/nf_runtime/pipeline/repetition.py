"""Which layers of a model repeat those before them. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from nf_runtime.graph import LayerGraph


class Repetition(NamedTuple):
    """How a model's layers repeat: from `head` on, each is like the one `period` layers before.

    Attributes:
        head: Layers before those that repeat.
        period: Layers until they do.
        layers: As many layers as are to be looked at; all others repeat, in whole periods.
    """

    head: int
    period: int
    layers: int


def find_repetition(graph: LayerGraph, behind: int) -> Repetition | None:
    """The repetition of which the fewest layers have to be looked at; None if that is all layers.

    Args:
        graph: The model.
        behind: As many layers as a plan lets an operation run behind others.
    """
    kinds = graph.layer_kinds
    count = len(kinds)
    found: Repetition | None = None
    for period in range(1, count // 2):
        head = count - period
        while head > 0 and kinds[head - 1] == kinds[head - 1 + period]:
            head -= 1
        # Those before the first tiles that repeat, these and the period they are compared with, and
        # one more, which keeps the end away from what is compared.
        layers = head + 2 * (behind + period) + 2 * period + 1
        layers += (count - layers) % period
        if layers < (count if found is None else found.layers):
            found = Repetition(head, period, layers)
    return found
