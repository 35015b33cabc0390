"""Plan sets from measurements: nothing is taken that was not faster, and no gap is left."""

import pytest
from pipeline_graphs import small_graph

from nf_runtime.measured import Load, Measured
from nf_runtime.pipeline.plan import Bucket, PlanSet
from nf_runtime.pipeline.plan_store import PlanTarget
from nf_runtime.pipeline.templates import co_resident, nanoflow, sequential
from nf_runtime.plan_buckets import default_loads, form_plan_set, loses

GRAPH = small_graph("dense")
PLANS = [sequential(GRAPH), nanoflow(GRAPH), co_resident(GRAPH)]
TARGET = PlanTarget("0123", "a device", "bfloat16", 2)


def measured(plan: str, load: Load, gain: float, low: float | None = None) -> Measured:
    quartiles = (gain - 0.05 if low is None else low, gain + 0.05)
    return Measured(plan, load, gain, quartiles, 1.0, 0.002, 1.0, 0.5, 0.5, None, ())


def form(*results: Measured, loads: tuple[Load, ...] = ()) -> PlanSet:
    by_load: dict[Load, list[Measured]] = {load: [] for load in loads}
    for result in results:
        by_load.setdefault(result.load, []).append(result)
    return form_plan_set(by_load, PLANS, TARGET)


def test_a_plan_set_says_what_it_was_measured_for() -> None:
    made = form(measured("nanoflow", Load(64, 128, 0), 1.2))
    assert (made.model, made.device, made.dtype, made.tensor_parallel_size) == TARGET
    assert [plan.name for plan in made.plans] == ["nanoflow"]
    (bucket,) = made.buckets
    assert (bucket.tokens, bucket.decode_share) == ((64, 64), (0.0, 1.0))
    assert (bucket.plan, bucket.gain) == ("nanoflow", 1.2)


def test_the_plan_with_the_greatest_gain_is_taken() -> None:
    load = Load(64, 128, 0)
    made = form(measured("nanoflow", load, 1.2), measured("co-resident", load, 1.3))
    assert [bucket.plan for bucket in made.buckets] == ["co-resident"]


@pytest.mark.parametrize("low", [0.99, 1.0])
def test_a_plan_that_was_not_faster_in_three_of_four_iterations_is_not(low: float) -> None:
    load = Load(64, 128, 0)
    made = form(measured("nanoflow", load, 1.4, low), measured("co-resident", load, 1.1))
    assert [bucket.plan for bucket in made.buckets] == ["co-resident"]
    made = form(measured("nanoflow", load, 1.4, low))
    (bucket,) = made.buckets
    assert (bucket.plan, bucket.gain) == ("sequential", None)


def test_a_plan_has_to_be_faster_with_every_context() -> None:
    short, long = Load(64, 128, 0), Load(64, 1024, 0)
    made = form(
        measured("nanoflow", short, 1.1),
        measured("nanoflow", long, 1.2),
        measured("co-resident", short, 2.0),
        measured("co-resident", long, 0.9),
    )
    (bucket,) = made.buckets
    assert (bucket.plan, bucket.gain) == ("nanoflow", 1.1)


def test_a_load_that_no_plan_cuts_is_sequential() -> None:
    made = form(loads=(Load(1, 128, 0),))
    assert [bucket.plan for bucket in made.buckets] == ["sequential"]


def test_buckets_meet_halfway_and_end_where_nothing_was_measured() -> None:
    made = form(
        measured("nanoflow", Load(8, 128, 0), 0.8),
        measured("nanoflow", Load(32, 128, 0), 1.2),
        measured("nanoflow", Load(128, 128, 0), 1.3),
    )
    tokens = [bucket.tokens for bucket in made.buckets]
    assert tokens == [(8, 16), (17, 64), (65, 128)]
    assert made.find(7, 7) is None
    assert made.find(129, 129) is None
    for count in range(8, 129):
        assert made.find(count, count) is not None


def test_shares_of_decodes_meet_in_the_middle() -> None:
    made = form(
        measured("nanoflow", Load(0, 0, 64), 0.9),
        measured("nanoflow", Load(32, 128, 32), 1.2),
        measured("co-resident", Load(64, 128, 0), 1.1),
    )
    plans = {}
    for decodes in (0, 15, 17, 32, 47, 49, 64):
        bucket = made.find(64, decodes)
        assert bucket is not None
        plans[decodes] = bucket.plan
    assert [plans[decodes] for decodes in (0, 15)] == ["sequential"] * 2
    assert [plans[decodes] for decodes in (17, 32, 47)] == ["nanoflow"] * 3
    assert [plans[decodes] for decodes in (49, 64)] == ["co-resident"] * 2


def test_the_usual_loads_keep_to_the_engines_sizes() -> None:
    loads = default_loads(256, 512)
    assert Load(1, 128, 0) in loads
    assert Load(128, 1024, 128) in loads
    assert Load(0, 0, 512) in loads
    for requests, tokens in ((256, 512), (4, 64), (1, 1), (1024, 2048)):
        for load in default_loads(requests, tokens):
            assert load.tokens <= tokens
            assert load.decodes + (load.prefill > 0) <= requests
        assert len(set(default_loads(requests, tokens))) == len(default_loads(requests, tokens))


@pytest.mark.parametrize("text", ["32x1024", "32x1024+256", "+256", "1x0"])
def test_loads_are_written_as_they_are_read(text: str) -> None:
    assert str(Load.parse(text)) == text


@pytest.mark.parametrize("text", ["", "32", "32x", "x1", "+0", "0x128", "-1x2", "32x1+", "a"])
def test_other_texts_are_no_loads(text: str) -> None:
    with pytest.raises(ValueError, match="expected DECODESxCONTEXT, such as 32x1024"):
        Load.parse(text)


def test_the_host_has_what_is_left_of_an_iteration() -> None:
    assert measured("nanoflow", Load(8, 1, 0), 1.0).host_share == pytest.approx(0.5)
    assert measured("nanoflow", Load(8, 1, 0), 1.0).tokens_per_second == pytest.approx(4000)


def buckets(*ranges: tuple[int, int, float, float]) -> PlanSet:
    return PlanSet(
        plans=(PLANS[0],),
        buckets=tuple(
            Bucket(tokens=(low, high), decode_share=(least, most), plan="sequential")
            for low, high, least, most in ranges
        ),
    )


def test_a_plan_set_for_the_same_batches_loses_nothing() -> None:
    old = buckets((1, 4, 0, 0.5), (5, 16, 0, 0.5), (1, 16, 0.5, 1))
    assert not loses(old, old)
    assert not loses(old, buckets((1, 8, 0, 1), (9, 12, 0, 1), (13, 20, 0, 1)))
    assert not loses(old, buckets((1, 16, 0, 0.3), (1, 16, 0.3, 0.8), (1, 16, 0.8, 1)))
    assert not loses(buckets(), old)


@pytest.mark.parametrize(
    "new",
    [
        buckets((1, 16, 0, 1)),  # fewer buckets
        buckets((1, 15, 0, 1), (1, 4, 0, 1), (1, 4, 0, 1)),
        buckets((2, 16, 0, 1), (2, 4, 0, 1), (2, 4, 0, 1)),
        buckets((1, 8, 0, 1), (10, 16, 0, 1), (1, 4, 0, 1)),
        buckets((1, 16, 0, 0.4), (1, 15, 0.4, 0.6), (1, 16, 0.6, 1)),
        buckets((1, 16, 0, 0.4), (1, 16, 0.6, 1), (1, 16, 0.6, 1)),
        buckets((1, 16, 0.1, 1), (1, 16, 0.1, 1), (1, 16, 0.1, 1)),
    ],
)
def test_a_plan_set_with_fewer_buckets_or_a_gap_loses_something(new: PlanSet) -> None:
    assert loses(buckets((1, 4, 0, 0.5), (5, 16, 0, 0.5), (1, 16, 0.5, 1)), new)
