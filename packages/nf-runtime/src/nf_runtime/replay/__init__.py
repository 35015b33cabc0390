"""Writes down what decides an engine's decisions, and repeats them from that.

A recorder gives an engine its clock and stands between it and its I/O. `Replay` gives scheduler, KV
cache and loop, which are the same code, what is in the log, and compares what they do.
"""

from nf_runtime.replay.log_cursor import DivergenceError
from nf_runtime.replay.log_format import LogEnd
from nf_runtime.replay.replay import Replay, ReplayedStep, ReplayReport

__all__ = ["DivergenceError", "LogEnd", "Replay", "ReplayReport", "ReplayedStep"]
