"""The policy and the admission that a config names. Torch-free."""

from nf_runtime.config import EngineConfig
from nf_scheduler import (
    POLICIES,
    Admission,
    OutputLengths,
    Policy,
    PredictedPeak,
    ReservingAdmission,
    ServiceLevel,
    SloAware,
)


def make_policy(config: EngineConfig) -> Policy:
    """Who goes first."""
    if config.policy == SloAware.name:
        levels = {name: ServiceLevel(**targets) for name, targets in config.service_levels.items()}
        return SloAware(levels)
    return POLICIES[config.policy]()


def make_admission(config: EngineConfig, lengths: OutputLengths, max_tokens: int) -> Admission:
    """Whether there are pages for one more.

    Args:
        config: Names it.
        lengths: How long answers get.
        max_tokens: Longest possible answer.
    """
    if config.admission == PredictedPeak.name:
        return PredictedPeak(lengths, max_tokens)
    return ReservingAdmission() if config.admission == ReservingAdmission.name else Admission()
