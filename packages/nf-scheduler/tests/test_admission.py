"""Whether there are pages for one more: predictions against what happens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_scheduler import (
    Admission,
    IterationResult,
    OutputLengths,
    PredictedPeak,
    Request,
    ReservingAdmission,
    Scheduler,
    SchedulerConfig,
)


class Certain:
    """Nobody ends before its limit."""

    def survival(self, lengths, ahead):
        return np.ones((len(lengths), len(ahead)))


def observe(lengths: OutputLengths, answers, cut: int | None = None) -> None:
    """Have answers of these lengths grow; those that reach `cut` are still running."""
    for length in answers:
        last = length if cut is None else min(length, cut)
        lengths.observe_tokens(np.arange(1, last + 1))
        if cut is None or length < cut:
            lengths.observe_end(length)


def test_the_estimate_is_that_of_the_answers():
    rng = np.random.default_rng(0)
    answers = rng.geometric(1 / 200, 4000)
    lengths = OutputLengths(4096)
    observe(lengths, answers)
    assert lengths.num_observed == 4000
    assert lengths.mean(0, 4096) == pytest.approx(answers.mean(), rel=0.05)
    assert lengths.mean(0, 100) == pytest.approx(np.minimum(answers, 100).mean(), rel=0.05)
    assert lengths.mean(300, 4096) == pytest.approx(answers[answers > 300].mean(), rel=0.1)
    for level in (0.5, 0.9):
        assert lengths.quantile(level, 4096) == pytest.approx(np.quantile(answers, level), abs=20)
    survival = lengths.survival(np.array([0, 160]), np.array([0, 16, 320]))
    assert survival[:, 0].tolist() == [1.0, 1.0]
    assert survival[0, 2] == pytest.approx((answers > 320).mean(), abs=0.03)
    assert survival[1, 2] == pytest.approx((answers > 480).sum() / (answers > 160).sum(), abs=0.05)


def test_answers_that_are_still_running_do_not_make_it_too_low():
    """A mean over finished answers would be 60 % too low here."""
    answers = np.random.default_rng(1).geometric(1 / 200, 4000)
    lengths = OutputLengths(4096)
    observe(lengths, answers, cut=200)
    finished = answers[answers < 200]
    assert finished.mean() < 0.45 * answers.mean()
    upto = np.minimum(answers, 200).mean()
    assert lengths.mean(0, 200) == pytest.approx(upto, rel=0.05)


def test_old_answers_are_forgotten():
    lengths = OutputLengths(1024)
    observe(lengths, [500] * 3000)
    observe(lengths, [20] * 60_000)
    assert lengths.mean(0, 1024) < 60


def test_before_anything_is_known_answers_have_512_tokens_or_their_limit():
    lengths = OutputLengths(8192)
    assert lengths.mean(0, 8192) == pytest.approx(512, rel=0.05)
    assert lengths.mean(0, 16) == 16


def make(toy, admission, num_pages: int) -> tuple[Scheduler, object]:
    pages = toy.Pages(4, num_pages)
    config = SchedulerConfig(max_model_len=256, max_num_batched_tokens=512)
    return Scheduler(pages, config, admission=admission), pages


def fill(scheduler: Scheduler, prompts: list[int], max_tokens: list[int]) -> int:
    """Add requests; how many of them are running after the first iteration."""
    for number, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
        scheduler.add(Request(f"r{number}", np.full(prompt, number, dtype=np.int32), limit))
    scheduler.schedule()
    return scheduler.num_running


def test_reserving_leaves_room_for_everyone_at_its_longest(toy):
    scheduler, _ = make(toy, ReservingAdmission(), 31)
    assert fill(scheduler, [8] * 5, [32] * 5) == 3  # ten pages each
    scheduler, _ = make(toy, Admission(), 31)
    assert fill(scheduler, [8] * 5, [32] * 5) == 5


def test_who_ends_soon_makes_room_for_who_needs_it_later(toy):
    """20 pages: ten requests of 4 tokens end before the long one has grown."""
    scheduler, _ = make(toy, PredictedPeak(Certain(), 256), 24)
    assert fill(scheduler, [4] * 10 + [4], [4] * 10 + [60]) == 11
    scheduler, _ = make(toy, ReservingAdmission(), 24)
    assert fill(scheduler, [4] * 10 + [4], [4] * 10 + [60]) < 11


def test_what_is_expected_to_be_short_is_admitted_with_a_margin(toy):
    short = OutputLengths(256)
    observe(short, [16] * 500)
    scheduler, _ = make(toy, PredictedPeak(short, 256), 62)
    predicted = fill(scheduler, [4] * 20, [200] * 20)
    scheduler, _ = make(toy, ReservingAdmission(), 62)
    assert fill(scheduler, [4] * 20, [200] * 20) == 1
    assert 5 <= predicted < 20


def test_whoever_is_alone_is_admitted_whatever_is_predicted(toy):
    class Never(Admission):
        def admits(self, sequence):
            return False

    scheduler, _ = make(toy, Never(), 64)
    assert fill(scheduler, [4] * 3, [4] * 3) == 1


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=12),
    num_pages=st.integers(24, 80),
)
def test_with_certain_lengths_nobody_gives_way(toy, requests, num_pages):
    """Up to what happens between two moments that are looked at, which the spare pages are for."""
    pages = toy.Pages(4, num_pages)
    config = SchedulerConfig(max_model_len=96, max_num_batched_tokens=512, max_num_seqs=12)

    class WithSpare(PredictedPeak):
        def begin(self, running, budget):
            super().begin(running, budget)
            self._num_pages -= len(running.order) + 1

    scheduler = Scheduler(pages, config, admission=WithSpare(Certain(), 96))
    for number, (prompt, limit) in enumerate(requests):
        scheduler.add(Request(f"r{number}", np.full(prompt, number, dtype=np.int32), limit))
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.commit(IterationResult(batch.iteration, np.zeros(len(batch), dtype=np.int32)))
    assert scheduler.num_preemptions == 0
