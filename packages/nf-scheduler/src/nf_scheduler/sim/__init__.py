"""What a scheduler would do: arrivals from a trace, times from a cost file.

The scheduler is the real one; pages are counted and time is computed, so that policies and
admissions are compared on any machine, the same numbers on each.
"""

from nf_scheduler.sim.cost import DEFAULT_COST, IterationCost, load_cost
from nf_scheduler.sim.report import SimulationReport
from nf_scheduler.sim.simulator import ADMISSIONS, Simulation, SimulationConfig
from nf_scheduler.sim.trace import Trace, TraceError, read_trace

__all__ = [
    "ADMISSIONS",
    "DEFAULT_COST",
    "IterationCost",
    "Simulation",
    "SimulationConfig",
    "SimulationReport",
    "Trace",
    "TraceError",
    "load_cost",
    "read_trace",
]
