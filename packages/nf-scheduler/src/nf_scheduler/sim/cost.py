"""How long iterations take on a device, as a small file says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

import numpy as np

from nf_scheduler.batch import Batch

_COSTS = resources.files("nf_scheduler.sim") / "costs"


@dataclass(slots=True, frozen=True, kw_only=True)
class IterationCost:
    """The time of an iteration, by what is in it.

    The dense operations take as long as reading the weights or as computing, whichever is longer.
    What follows from the length of sequences (attention reads their KV) comes on top, as
    where operations run one after the other.

    Attributes:
        name: model and device.
        source: where the numbers are from.
        overhead_seconds: of every iteration: launches, sampling.
        weight_seconds: to read the weights once.
        token_seconds: to compute a token.
        context_token_seconds: to read the KV of a token.
        restore_token_seconds: to bring the KV of a token from the host.
    """

    name: str
    source: str
    overhead_seconds: float
    weight_seconds: float
    token_seconds: float
    context_token_seconds: float
    restore_token_seconds: float

    def seconds(self, batch: Batch) -> float:
        """The time of an iteration."""
        # Every request's KV is read once: that of a prefill chunk for all its queries together.
        context = int((batch.context_lens + np.diff(batch.query_start)).sum())
        dense = max(self.weight_seconds, batch.num_tokens * self.token_seconds)
        return self.overhead_seconds + dense + context * self.context_token_seconds


DEFAULT_COST = "qwen3-30b-a3b-h200"
"""Of the cost files that come along, the one that is taken where none is named."""


def load_cost(name_or_path: str = DEFAULT_COST) -> IterationCost:
    """Read a cost file.

    Args:
        name_or_path: one that comes along, by its name, or the path of a JSON file.

    Raises:
        ValueError: there is none, or it has other than the fields of `IterationCost`.
    """
    known = {file.name.removesuffix(".json"): file for file in _COSTS.iterdir()}
    file = known.get(name_or_path) or Path(name_or_path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cost is {name_or_path!r}, which cannot be read: {error}. Expected a JSON file, or "
            f"one of {', '.join(sorted(known))}."
        ) from error
    names = {field.name for field in fields(IterationCost)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"{name_or_path}: expected an object with {', '.join(sorted(names))}.")
    for name, value in values.items():
        is_number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
        if not (isinstance(value, str) if name in ("name", "source") else is_number):
            raise ValueError(f"{name_or_path}: {name} is {value!r}; expected seconds, 0 or more.")
    return IterationCost(**values)
