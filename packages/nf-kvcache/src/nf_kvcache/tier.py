"""The places that KV can be in."""

import enum


class Tier(enum.IntEnum):
    """A tier, fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2

    @property
    def label(self) -> str:
        """Its name in statistics, log lines and metrics: device, host or disk."""
        return self.name.lower()
