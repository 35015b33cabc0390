"""Any legal plan gives what the sequential one gives, bit by bit, however its lanes go."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_plans import legal_plans

from nf_kernels import native_status
from nf_runtime import LLM, SamplingParams
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.plan import Plan, for_all_batches
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.pipeline.random_order import random_order
from nf_runtime.pipeline.schedule import Code, Schedule
from nf_runtime.pipeline.templates import co_resident, nanoflow

MakeCheckpoint = Callable[..., Path]
Answers = list[tuple[list[int], list[float], list[float]]]

EXAMPLES, MANY = 8, 60
FEW = 4  # in plain torch, which is slow


@dataclass
class Model:
    """A model on one engine.

    Attributes:
        llm: The engine.
        seen: What happened over all examples.
    """

    llm: LLM
    seen: Counter[str]

    def answers(self, prompts: list[list[int]], count: int) -> Answers:
        """Tokens, their log-probabilities, and those of the prompt."""
        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [
            (
                output.outputs[0].token_ids,
                [entry.logprob for row in output.outputs[0].logprobs for entry in row.values()],
                [e.logprob for row in output.prompt_logprobs if row for e in row.values()],
            )
            for output in outputs
        ]

    def by(self, plan: Plan | None) -> None:
        """Run by a plan from now on; None is the sequential one."""
        executor, graph = self.llm.engine.executor, self.llm.engine.graph
        executor.set_policy(OverlapPolicy(graph, plan and for_all_batches(plan)))
        executor.timeline.clear()


def load(path: Path, **options: Any) -> Model:
    llm = LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_batched_tokens=40,
        max_num_seqs=8,
        kv_cache_tokens=2048,
        enable_prefix_caching=False,
        timeline_every=1,
        **options,
    )
    llm.engine.executor.timeline.revise = lambda choice, *_: choice  # type: ignore[method-assign]
    return Model(llm, Counter())


@pytest.fixture(
    scope="module",
    params=["lanes", "random order", "random order, plain torch"],
)
def model(
    request: pytest.FixtureRequest, family: str, tiny_checkpoint: MakeCheckpoint
) -> Iterator[Model]:
    """Each family on native lanes; operation by operation in random orders; and in plain torch."""
    if request.param == "lanes" and not native_status().available:
        pytest.skip("lanes of a CPU need the native kernels")
    plain = request.param.endswith("torch")
    if plain and family not in ("llama3", "qwen3-moe"):
        pytest.skip("plain torch is tried on one dense and one mixed family")
    path = tiny_checkpoint(family)
    made = load(path, native_programs=request.param == "lanes", native_kernels=not plain)
    if request.param != "lanes":
        random = Random(7)
        made.llm.engine.executor.stream_runner.order = partial(random_order, random=random)
    yield made
    examples = FEW if plain else EXAMPLES
    assert made.seen["examples"] >= examples
    assert made.seen["iterations with several nano-batches"] >= examples
    assert made.seen["iterations with several lanes"] >= examples / 2
    assert made.seen["prompts cut in two"] > 0
    made.llm.shutdown()


prompt_lengths = st.lists(st.one_of(st.integers(2, 9), st.integers(2, 70)), min_size=3, max_size=7)


def test_tokens_and_logits_are_those_of_the_sequential_plan(model: Model) -> None:
    check_random_plans(model, EXAMPLES)


@pytest.mark.long
def test_tokens_and_logits_are_those_of_the_sequential_plan_many_times(model: Model) -> None:
    check_random_plans(model, MANY)


def check_random_plans(model: Model, examples: int) -> None:
    graph = model.llm.engine.graph
    exact = model.llm.engine.config.native_kernels  # all native operations are invariant

    @settings(
        max_examples=examples if exact else FEW,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(legal_plans(graph), prompt_lengths, st.integers(2, 6), st.integers(0, 1 << 20))
    def check(plan: Plan, lengths: list[int], count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        prompts = [random.integers(0, 200, length).tolist() for length in lengths]
        model.by(None)
        expected = model.answers(prompts, count)
        model.by(plan)
        found = model.answers(prompts, count)
        if exact:
            assert found == expected
        else:
            for (tokens, *logprobs), (wanted, *wanted_logprobs) in zip(
                found, expected, strict=True
            ):
                assert tokens == wanted
                for got, want in zip(logprobs, wanted_logprobs, strict=True):
                    assert got == pytest.approx(want, abs=1e-4)
        look_at_traces(model)
        model.llm.engine.kv_cache.check_integrity()

    check()


def look_at_traces(model: Model) -> None:
    """No iteration raced, by vector clocks; note what the iterations were like."""
    executor, seen = model.llm.engine.executor, model.seen
    seen["examples"] += 1
    for trace in executor.timeline.traces:
        schedule, division = trace.schedule, trace.division
        assert find_races(schedule, division, executor.workspace, trace.contexts) == []
        seen["iterations with several nano-batches"] += division.num_occupied > 1
        seen["iterations with several lanes"] += sum(map(len, schedule.commands[1:])) > 0
        requests = division.segment_request
        seen["prompts cut in two"] += len(set(requests.tolist())) < len(requests)


@pytest.fixture(scope="module")
def in_random_order(tiny_checkpoint: MakeCheckpoint) -> Iterator[Model]:
    made = load(tiny_checkpoint("llama3"), native_programs=False)
    yield made
    made.llm.shutdown()


PROMPTS = [np.random.default_rng(1).integers(0, 200, n).tolist() for n in (50, 3, 33, 17, 9)]


def differ(model: Model, damage: Callable[[Schedule], Schedule], plan: Plan) -> int:
    """How many of some random orders of damaged schedules give other answers."""
    runner = model.llm.engine.executor.stream_runner
    model.by(None)
    expected = model.answers(PROMPTS, 4)
    whole = runner.order
    wrong = 0
    try:
        for seed in range(8):
            random = Random(seed)
            runner.order = lambda schedule, random=random: random_order(damage(schedule), random)
            model.by(plan)
            wrong += model.answers(PROMPTS, 4) != expected
    finally:
        runner.order = whole
    return wrong


def without(schedule: Schedule, code: Code, which: int) -> Schedule:
    """The schedule without one of its commands, on the last lane that has such."""
    commands = list(schedule.commands)
    for lane in reversed(range(len(commands))):
        places = np.flatnonzero(commands[lane][:, 0] == code)
        if len(places):
            commands[lane] = np.delete(commands[lane], places[which % len(places)], axis=0)
            break
    return replace(schedule, commands=tuple(commands))


def without_an_event(schedule: Schedule) -> Schedule:
    """The schedule without one event: neither signalled nor waited for."""
    if not schedule.num_events:
        return schedule
    event = schedule.num_events - 1
    commands = tuple(
        lane[(lane[:, 0] == Code.LAUNCH) | (lane[:, 1] != event)] for lane in schedule.commands
    )
    return replace(schedule, commands=commands)


def with_two_swapped(schedule: Schedule) -> Schedule:
    """The schedule with two nano-batches of one operation in each other's place."""
    place = schedule.nodes[:, :2]
    second_layer = np.flatnonzero(place[:, 0] == 2)
    if not len(second_layer):
        return schedule
    same = np.flatnonzero((place == place[second_layer[0]]).all(axis=1))
    if len(same) < 2:
        return schedule
    exchanged = {int(same[0]): int(same[1]), int(same[1]): int(same[0])}
    commands = tuple(
        np.array(
            [
                (code, exchanged.get(argument, argument) if code == Code.LAUNCH else argument)
                for code, argument in lane.tolist()
            ],
            dtype=np.int32,
        ).reshape(-1, 2)
        for lane in schedule.commands
    )
    return replace(schedule, commands=commands)


def test_the_whole_schedule_is_right_in_any_order(in_random_order: Model) -> None:
    graph = in_random_order.llm.engine.graph
    for template in (nanoflow, co_resident):
        assert differ(in_random_order, lambda schedule: schedule, template(graph)) == 0


@pytest.mark.parametrize("which", range(3))
def test_a_wait_that_is_left_out_shows(in_random_order: Model, which: int) -> None:
    graph = in_random_order.llm.engine.graph
    damage = partial(without, code=Code.WAIT, which=which)
    assert differ(in_random_order, damage, nanoflow(graph)) > 0


def test_an_event_that_is_left_out_shows(in_random_order: Model) -> None:
    graph = in_random_order.llm.engine.graph
    assert differ(in_random_order, without_an_event, nanoflow(graph)) > 0


def test_two_nano_batches_in_each_others_place_show(in_random_order: Model) -> None:
    graph = in_random_order.llm.engine.graph
    assert differ(in_random_order, with_two_swapped, nanoflow(graph)) > 0
