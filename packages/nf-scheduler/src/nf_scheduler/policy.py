"""Who goes first, and how much prefill goes beside decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nf_scheduler.iteration_times import IterationTimes
from nf_scheduler.output_lengths import OutputLengths
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence


@dataclass(slots=True, frozen=True)
class PolicyFacts:
    """What a policy may look at when it ranks a request.

    Attributes:
        lengths: how long answers get.
        count_cached: tokens of a request whose KV would be found now.
    """

    lengths: OutputLengths
    count_cached: Callable[[Sequence], int]


class Policy:
    """First come, first served; the base of the others.

    A rank is a time: that of arrival, moved by as much as the policy wants to hurry a request or to
    let it wait. The lowest goes first; when pages run out, the highest gives way. So nobody
    starves: however far somebody was moved, those who arrive later than that come after.

    Attributes:
        name: for the command line and for logs.
        reranks: whether a rank may change while a request is queued.
    """

    name = "fcfs"
    reranks = False

    def rank(self, sequence: Sequence, facts: PolicyFacts) -> float:
        """Where a request stands among others, in seconds of the scheduler's clock."""
        return sequence.ledger.arrival

    def started(self, slot: int, sequence: Sequence) -> None:
        """A request has got a slot."""

    def prefill_tokens(
        self, running: RunningSet, decodes: np.ndarray, budget: int, now: float
    ) -> int:
        """How many prompt tokens may go beside these decodes.

        Args:
            running: the running requests.
            decodes: their slots, intp.
            budget: how many tokens there is room for.
            now: time of the scheduler's clock.
        """
        return budget

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """An iteration took so long."""


class Priority(Policy):
    """Lower `Request.priority` goes first; who waits catches up.

    Args:
        ageing_seconds: waiting so long is worth one step of priority.
    """

    name = "priority"

    def __init__(self, ageing_seconds: float = 30.0) -> None:
        self._ageing_seconds = ageing_seconds

    def rank(self, sequence: Sequence, facts: PolicyFacts) -> float:
        """Arrival, later by `ageing_seconds` for each step."""
        return sequence.ledger.arrival + self._ageing_seconds * sequence.request.priority


class ShortestFirst(Policy):
    """The least predicted work goes first; who waits catches up.

    Args:
        seconds_per_token: so long a request waits for those that are a token shorter.
    """

    name = "shortest"

    def __init__(self, seconds_per_token: float = 0.02) -> None:
        self._seconds_per_token = seconds_per_token

    def rank(self, sequence: Sequence, facts: PolicyFacts) -> float:
        """Arrival, later by the tokens to compute: the prompt, and the answer as predicted."""
        answer = facts.lengths.mean(0, sequence.request.max_tokens)
        work = sequence.request.prompt_len + answer
        return sequence.ledger.arrival + self._seconds_per_token * work


class PrefixAffinity(Policy):
    """Requests whose prefix is cached go first, while it is; who waits catches up.

    Args:
        seconds_per_token: so much earlier a request may go for each token found.
    """

    name = "prefix"
    reranks = True

    def __init__(self, seconds_per_token: float = 0.02) -> None:
        self._seconds_per_token = seconds_per_token

    def rank(self, sequence: Sequence, facts: PolicyFacts) -> float:
        """Arrival, earlier by what is cached."""
        return sequence.ledger.arrival - self._seconds_per_token * facts.count_cached(sequence)


@dataclass(slots=True, frozen=True)
class ServiceLevel:
    """What a class of requests is promised.

    Attributes:
        ttft: seconds until the first token.
        tpot: seconds per token after that, on average.

    Raises:
        ValueError: one of them is not above 0.
    """

    ttft: float = math.inf
    tpot: float = math.inf

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds above 0.")


_NO_TARGET_SECONDS = 60.0  # who has no target for the first token is due so late


class SloAware(Policy):
    """Whose first token is due first goes first; prefill goes beside decodes as these allow it.

    Every iteration takes as long as the decode that has least time allows: that is how far the
    request is ahead of its target per token, and at least the target itself. The prefill that fits
    into that follows from how long iterations have taken. A share of the budget is for prefill in
    any case, so that a target that cannot be met stops nobody.

    Args:
        levels: by `Request.request_class`. Requests of another class have the level "", or none.
        least_share: of the budget that prefill always may have.
    """

    name = "slo"

    def __init__(self, levels: Mapping[str, ServiceLevel], *, least_share: float = 0.125) -> None:
        self._levels = dict(levels)
        self._default = self._levels.get("", ServiceLevel())
        self._least_share = least_share
        self._times = IterationTimes()
        self._tpot = np.full(0, math.inf)  # by slot

    def started(self, slot: int, sequence: Sequence) -> None:
        """Remember the target of whoever has this slot."""
        if slot >= len(self._tpot):
            more = np.full(2 * slot + 1 - len(self._tpot), math.inf)
            self._tpot = np.concatenate((self._tpot, more))
        self._tpot[slot] = self._level(sequence).tpot

    def rank(self, sequence: Sequence, facts: PolicyFacts) -> float:
        """When the first token is due."""
        ttft = self._level(sequence).ttft
        return sequence.ledger.arrival + min(ttft, _NO_TARGET_SECONDS)

    def prefill_tokens(
        self, running: RunningSet, decodes: np.ndarray, budget: int, now: float
    ) -> int:
        """As many as the iteration has time for."""
        seconds = self._time_left(running, decodes, now)
        fitting = self._times.fitting_prefill(len(decodes), seconds)
        least = math.ceil(self._least_share * budget)
        return min(budget, max(least, fitting))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn how long iterations take."""
        self._times.observe(num_decodes, num_prefill_tokens, seconds)

    def _level(self, sequence: Sequence) -> ServiceLevel:
        return self._levels.get(sequence.request.request_class, self._default)

    def _time_left(self, running: RunningSet, decodes: np.ndarray, now: float) -> float:
        """How long an iteration may take such that the next token of every decode is in time."""
        tpot = self._tpot[decodes]
        # The token that this iteration gives is the one after all that are known, or a later one.
        count = running.known[decodes] - running.prompt_len[decodes] + 1
        due = running.first_token[decodes] + tpot * count
        # Whose first token is still in flight has no time yet, which is NaN here.
        return float(np.fmax(tpot, due - now).min(initial=math.inf))


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Policy, Priority, ShortestFirst, PrefixAffinity, SloAware)
}
"""The policies by name."""
