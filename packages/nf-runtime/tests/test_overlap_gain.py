"""What overlap gains is measured beside sequential iterations with batches alike."""

import pytest
from pipeline_graphs import small_graph

from nf_runtime.pipeline.overlap_gain import OverlapGain
from nf_runtime.pipeline.policy import Choice, Reason
from nf_runtime.pipeline.templates import nanoflow, sequential
from nf_runtime.timeline import Timeline

GRAPH = small_graph("dense")
SEQUENTIAL = sequential(GRAPH)
PLANNED = Choice(nanoflow(GRAPH), Reason.PLANNED)


def timed(gain: OverlapGain, choice: Choice, tokens: int, decodes: int, wall_ns: int) -> None:
    gain.add(choice.plan, choice.reason, tokens, decodes, wall_ns)


def test_without_a_timed_iteration_nothing_is_compared() -> None:
    gain = OverlapGain()
    assert gain.revise(PLANNED, SEQUENTIAL, 64, 64) is PLANNED
    assert gain.ratios() == {}


def test_a_batch_alike_runs_sequentially_once_after_a_timed_one() -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 1000)
    revised = gain.revise(PLANNED, SEQUENTIAL, 100, 100)  # within a factor of 2
    assert revised == Choice(SEQUENTIAL, Reason.REFERENCE)
    assert gain.revise(PLANNED, SEQUENTIAL, 64, 64) is PLANNED


@pytest.mark.parametrize(("tokens", "decodes"), [(128, 128), (31, 31), (64, 32), (64, 0)])
def test_other_batches_are_no_reference(tokens: int, decodes: int) -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 1000)
    assert gain.revise(PLANNED, SEQUENTIAL, tokens, decodes) is PLANNED


def test_a_sequential_choice_stays_what_it_is() -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 1000)
    choice = Choice(SEQUENTIAL, Reason.ONE_NANO_BATCH)
    assert gain.revise(choice, SEQUENTIAL, 64, 64) is choice


def test_the_ratio_is_of_times_per_token() -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 640)
    assert gain.ratios() == {}
    timed(gain, Choice(SEQUENTIAL, Reason.REFERENCE), 100, 100, 1500)
    assert gain.ratios() == {"nanoflow": pytest.approx(1.5)}


def test_later_measurements_move_the_ratio_by_a_fifth() -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 640)
    reference = Choice(SEQUENTIAL, Reason.REFERENCE)
    timed(gain, reference, 64, 64, 640)
    timed(gain, reference, 64, 64, 1280)
    assert gain.ratios() == {"nanoflow": pytest.approx(1.2)}


def test_the_ratio_of_a_plan_is_the_mean_over_its_batches() -> None:
    gain = OverlapGain()
    reference = Choice(SEQUENTIAL, Reason.REFERENCE)
    for tokens, faster in ((64, 1.5), (512, 0.5)):
        timed(gain, PLANNED, tokens, tokens, 1000 * tokens)
        timed(gain, reference, tokens, tokens, round(faster * 1000 * tokens))
    assert gain.ratios() == {"nanoflow": pytest.approx(1.0)}


@pytest.mark.parametrize("reason", [Reason.OFF, Reason.NO_GAIN, Reason.HOOKS])
def test_iterations_that_are_sequential_for_another_reason_do_not_count(reason: Reason) -> None:
    gain = OverlapGain()
    timed(gain, PLANNED, 64, 64, 640)
    timed(gain, Choice(SEQUENTIAL, reason), 64, 64, 6400)
    timed(gain, Choice(SEQUENTIAL, Reason.PLANNED), 64, 64, 6400)
    assert gain.ratios() == {}


def test_one_of_so_many_iterations_is_timed_and_each_reference() -> None:
    timeline = Timeline(every=3)
    assert [timeline.count(PLANNED) for _ in range(7)] == [False, False, True] * 2 + [False]
    assert timeline.count(Choice(SEQUENTIAL, Reason.REFERENCE))
    assert timeline.steps == {("nanoflow", "planned"): 7, ("sequential", "reference"): 1}


def test_a_timeline_that_is_off_counts_and_compares_nothing() -> None:
    timeline = Timeline(every=0)
    timed(timeline.gain, PLANNED, 64, 64, 640)
    assert timeline.revise(PLANNED, SEQUENTIAL, 64, 64) is PLANNED
    assert not timeline.count(PLANNED)
    assert timeline.steps == {("nanoflow", "planned"): 1}
