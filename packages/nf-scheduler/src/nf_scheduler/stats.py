"""Where a scheduler stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class SchedulerStats:
    """Where a scheduler stands, and what happened so far.

    Attributes:
        num_running: requests that take part in iterations.
        num_waiting: requests that are queued, for the first time or again, or being restored.
        num_restoring: those of them that are being restored.
        queued_prompt_tokens: prompt tokens of those that are queued.
        tenants: tenants with requests, and some that had.
        preemptions: how often a request gave up its pages.
        refused: requests that the queue had no room for.
        timeouts: requests whose deadline passed.
    """

    num_running: int
    num_waiting: int
    num_restoring: int
    queued_prompt_tokens: int
    tenants: int
    preemptions: int
    refused: int
    timeouts: int
