"""The scheduler that a config asks for. Torch-free."""

from collections.abc import Callable

from nf_runtime.config import EngineConfig
from nf_scheduler import (
    POLICIES,
    Admission,
    OutputLengths,
    PageBudget,
    Policy,
    PredictedPeak,
    ReservingAdmission,
    Scheduler,
    SchedulerConfig,
    ServiceLevel,
    SloAware,
    TokenBudget,
)


def make_scheduler(
    config: EngineConfig,
    pages: PageBudget,
    max_model_len: int,
    clock: Callable[[], float],
    budgets: tuple[TokenBudget, ...] = (),
) -> Scheduler:
    """The scheduler of an engine.

    Args:
        config: Its limits, policy and admission, on its device.
        pages: Who owns the KV pages.
        max_model_len: Tokens of a prompt and its answer.
        clock: Seconds.
        budgets: Tokens of a batch by number of decodes, where plans say so.
    """
    lengths = OutputLengths(max_model_len)
    return Scheduler(
        pages,
        SchedulerConfig(
            max_model_len=max_model_len,
            max_num_batched_tokens=config.batch_tokens,
            max_num_seqs=config.max_num_seqs,
            max_prefill_chunk=config.max_prefill_chunk,
            budgets=budgets,
            max_queued_requests=config.max_num_queued_reqs,
            max_queued_tokens=config.max_num_queued_tokens,
        ),
        policy=_make_policy(config),
        admission=_make_admission(config, lengths, max_model_len),
        lengths=lengths,
        clock=clock,
    )


def _make_policy(config: EngineConfig) -> Policy:
    """Who goes first."""
    if config.policy == SloAware.name:
        levels = {name: ServiceLevel(**targets) for name, targets in config.service_levels.items()}
        return SloAware(levels)
    return POLICIES[config.policy]()


def _make_admission(config: EngineConfig, lengths: OutputLengths, max_tokens: int) -> Admission:
    """Whether there are pages for one more.

    Args:
        config: Names it.
        lengths: How long answers get.
        max_tokens: Longest possible answer.
    """
    if config.admission == PredictedPeak.name:
        return PredictedPeak(lengths, max_tokens)
    return ReservingAdmission() if config.admission == ReservingAdmission.name else Admission()
