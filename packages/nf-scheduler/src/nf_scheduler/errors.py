"""What callers can catch."""

from __future__ import annotations


class QueueFull(RuntimeError):
    """The queue has no room for another request; nothing has changed. Later there may be."""
