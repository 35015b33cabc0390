"""Plans and plan sets: what is legal, what a file must hold, and which bucket is found."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_graphs import MODELS, small_graph, with_collectives
from pydantic import ValidationError
from random_plans import legal_plans

from nf_runtime.pipeline.plan import (
    Bucket,
    Lane,
    NanoBatch,
    NanoOperation,
    Phase,
    Plan,
    PlanError,
    PlanSet,
    for_all_batches,
    read_plan_set,
)
from nf_runtime.pipeline.templates import TEMPLATES, sequential

LANES = (Lane(name="compute", share=0.6), Lane(name="memory", share=0.4))


def plan(**values: Any) -> Plan:
    defaults: dict[str, Any] = {
        "name": "mine",
        "nano_batches": (NanoBatch(), NanoBatch()),
        "lanes": LANES,
        "operations": (NanoOperation(operation="qkv_proj", nano_batches=(0, 1)),),
    }
    return Plan(**(defaults | values))


def plan_set(**values: Any) -> PlanSet:
    defaults: dict[str, Any] = {
        "plans": (plan(),),
        "buckets": (Bucket(tokens=(1, 9), plan="mine"),),
    }
    return PlanSet(**(defaults | values))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


# --- what a file holds


@settings(deadline=None, max_examples=30)
@given(legal_plans(small_graph("mixed")))
def test_a_plan_is_the_same_after_json(drawn: Plan) -> None:
    assert Plan.model_validate_json(drawn.model_dump_json()) == drawn


@pytest.mark.parametrize("model", MODELS)
def test_templates_are_the_same_after_a_file(model: str, file: Path) -> None:
    graph = with_collectives(small_graph(model))
    plans = tuple(template(graph) for template in TEMPLATES.values())
    mine = plan_set(
        model="Bär",
        device="a device",
        dtype="bfloat16",
        tensor_parallel_size=2,
        plans=plans,
        buckets=(
            Bucket(tokens=(1, 64), plan="sequential"),
            Bucket(
                tokens=(65, 2048),
                decode_share=(0.25, 1),
                plan="nanoflow",
                token_budget=2048,
                prefill_chunk=512,
                gain=1.25,
            ),
        ),
    )
    mine.save(file)
    assert read_plan_set(file) == mine
    assert [mine.plan(name).name for name in TEMPLATES] == list(TEMPLATES)


def test_a_file_may_lie_in_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "mine" / "set.json"
    plan_set().save(path)
    assert read_plan_set(path) == plan_set()


@pytest.mark.parametrize("name", ["mine", "buckets", "plans"])
def test_a_file_with_one_plan_is_for_all_batches(name: str, file: Path) -> None:
    file.write_text(plan(name=name).model_dump_json())
    read = read_plan_set(file)
    assert read == for_all_batches(plan(name=name))
    assert read.find(1, 0) == read.find(1 << 20, 1 << 20) == read.buckets[0]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json cannot be read: .*No such file"):
        read_plan_set(tmp_path / "none.json")
    with pytest.raises(PlanError, match=r"cannot be read: .*directory"):
        read_plan_set(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary cannot be read: .*decode"):
        read_plan_set(tmp_path / "binary")


@pytest.mark.parametrize("text", ["", "{", '{"name": "mine", "ope', "[" * 100_000])
def test_a_file_that_is_no_json(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(
        PlanError, match=r"plan\.json is no JSON: .*; expected a plan or a plan set"
    ):
        read_plan_set(file)


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    text = plan_set().model_dump_json()
    for end in range(len(text)):
        file.write_text(text[:end])
        with pytest.raises(PlanError, match=r"plan\.json is no JSON"):
            read_plan_set(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is no plan: the file is 3: Input should be"),
        ([], "is no plan: the file: Input should be"),
        ({"name": "mine"}, r"is no plan: nano_batches: Field required \(and 1 more\)"),
        ({"plans": []}, "is no plan set: buckets: Field required"),
        ({"plans": [{}], "buckets": []}, r"is no plan set: plans\.0\.name: Field required"),
        (
            json.loads(plan().model_dump_json()) | {"speed": 9},
            "is no plan: speed is 9: Extra inputs are not permitted",
        ),
        (
            json.loads(plan().model_dump_json()) | {"schema_version": 2},
            "is no plan: schema_version is 2: Input should be 1",
        ),
        (
            json.loads(plan_set().model_dump_json()) | {"schema_version": "new"},
            "is no plan set: schema_version is 'new': Input should be 1",
        ),
        (
            json.loads(plan().model_dump_json()) | {"lanes": [{"name": "a", "share": 7}]},
            r"is no plan: lanes\.0\.share is 7: Input should be less than or equal to 1",
        ),
        (
            json.loads(plan().model_dump_json())
            | {"lanes": []}
            | {"operations": [{"operation": "x", "lane": "fast"}]},
            r"is no plan: the file: x:0 is on lane 'fast'; expected one of \['device'\]",
        ),
    ],
)
def test_a_file_with_other_json_says_where_it_is_wrong(
    value: Any, message: str, file: Path
) -> None:
    file.write_text(json.dumps(value))
    with pytest.raises(PlanError, match=r"plan\.json " + message):
        read_plan_set(file)


# --- what a plan may say


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), float("inf"), float("-inf")])
def test_a_share_is_above_zero_and_at_most_one(share: float, file: Path) -> None:
    with pytest.raises(ValidationError, match="share"):
        NanoBatch(share=share)
    with pytest.raises(ValidationError, match="share"):
        Lane(name="compute", share=share)
    file.write_text(
        json.dumps({"name": "mine", "operations": [], "nano_batches": [{"share": share}]})
    )
    with pytest.raises(PlanError, match=r"nano_batches\.0\.share is "):
        read_plan_set(file)


@pytest.mark.parametrize("numbers", [(), (0, 2), (1, 0), (0, 0)])
def test_nano_batches_of_an_operation_have_no_gaps(numbers: tuple[int, ...]) -> None:
    message = rf"nano_batches of 'qkv_proj' is \[{', '.join(map(str, numbers))}\]; expected at "
    with pytest.raises(ValidationError, match=message + "least one number, ascending and without"):
        NanoOperation(operation="qkv_proj", nano_batches=numbers)


def test_an_operation_on_an_unknown_lane() -> None:
    message = r"qkv_proj:0 is on lane 'fast'; expected one of \['device', 'compute', 'memory'\]"
    with pytest.raises(ValidationError, match=message):
        plan(operations=(NanoOperation(operation="qkv_proj", lane="fast"),))


def test_an_operation_on_a_nano_batch_that_there_is_not() -> None:
    message = r"qkv_proj is on nano-batches \[1, 2\]; the plan has 2, counted from 0"
    with pytest.raises(ValidationError, match=message):
        plan(operations=(NanoOperation(operation="qkv_proj", nano_batches=(1, 2)),))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "device")])
def test_lanes_have_different_names(names: tuple[str, str]) -> None:
    message = rf"lanes are named \['{names[0]}', '{names[1]}'\]; expected different names, and none"
    with pytest.raises(ValidationError, match=message):
        plan(lanes=tuple(Lane(name=name, share=0.5) for name in names))


@pytest.mark.parametrize(
    "phases",
    [
        ("all", "decode"),
        ("decode", "all", "prefill"),
        ("prefill", "decode"),
        ("decode", "prefill", "decode"),
        ("decode", "decode"),
        ("prefill",),
    ],
)
def test_phases_are_all_or_decodes_and_then_prefills(phases: tuple[str, ...]) -> None:
    message = r"nano_batches have the phases \['.*'\]; expected 'all' for each, or some of 'decode'"
    with pytest.raises(ValidationError, match=message) as error:
        plan(nano_batches=tuple(NanoBatch(phase=Phase(phase)) for phase in phases))
    assert str(list(phases)) in str(error.value)


@pytest.mark.parametrize("count", [0, 17])
def test_a_plan_has_one_to_sixteen_nano_batches(count: int) -> None:
    with pytest.raises(ValidationError, match="nano_batches"):
        plan(nano_batches=(NanoBatch(),) * count)


def test_after_start_names_others_of_the_plan() -> None:
    first = NanoOperation(operation="a", after_start=("b:0", "c:0"))
    message = r"a:0 starts after \['c:0'\], which are none of the plan's nano-operations; expected"
    with pytest.raises(ValidationError, match=message):
        plan(operations=(first, NanoOperation(operation="b")))
    with pytest.raises(ValidationError, match="a:0 has itself in after_start; expected others"):
        plan(operations=(NanoOperation(operation="a", after_start=("a:0",)),))


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "x" * 65])
def test_names_are_words(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        plan(name=name)


def test_only_one_nano_batch_on_the_whole_device_is_sequential() -> None:
    assert sequential(small_graph("dense")).is_sequential
    assert not plan().is_sequential
    assert not plan(nano_batches=(NanoBatch(),), operations=()).is_sequential
    assert plan().lane_names == ("device", "compute", "memory")


# --- plan sets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": (9, 8)}, r"tokens is \[9, 8\]; expected the lower bound first"),
        ({"tokens": (0, 8)}, "tokens.0"),
        ({"decode_share": (0.75, 0.5)}, r"decode_share is \[0.75, 0.5\]; expected the lower bound"),
        ({"decode_share": (-0.1, 0.5)}, "decode_share.0"),
        ({"decode_share": (0, 1.5)}, "decode_share.1"),
        ({"decode_share": (float("nan"), 1)}, "decode_share.0"),
        ({"token_budget": 0}, "token_budget"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"gain": 0}, "gain"),
        ({"gain": float("inf")}, "gain"),
        ({"gain": float("nan")}, "gain"),
    ],
)
def test_bounds_of_a_bucket(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Bucket(**({"tokens": (1, 9), "plan": "mine"} | values))


def test_a_bucket_has_a_plan_of_the_set() -> None:
    message = r"a bucket has the plan 'other'; expected one of \['mine'\]"
    with pytest.raises(ValidationError, match=message):
        plan_set(buckets=(Bucket(tokens=(1, 9), plan="other"),))
    with pytest.raises(PlanError, match=r"plan is 'other'; expected one of \['mine'\]"):
        plan_set().plan("other")


def test_plans_of_a_set_have_different_names() -> None:
    with pytest.raises(ValidationError, match=r"plans are named \['mine', 'mine'\]; expected diff"):
        plan_set(plans=(plan(), plan()))


def test_the_first_bucket_that_holds_a_batch_is_found() -> None:
    decodes = Bucket(tokens=(8, 64), decode_share=(0.5, 1), plan="mine")
    some = Bucket(tokens=(8, 64), plan="mine", gain=1.1)
    many = Bucket(tokens=(64, 512), plan="mine")
    mine = plan_set(buckets=(decodes, some, many))
    assert mine.find(7, 7) is None
    assert mine.find(8, 4) == decodes
    assert mine.find(8, 3) == some
    assert mine.find(64, 64) == decodes
    assert mine.find(64, 0) == some
    assert mine.find(65, 65) == many
    assert mine.find(513, 0) is None


@settings(deadline=None)
@given(st.integers(1, 1 << 30), st.floats(0, 1))
def test_a_plan_for_all_batches_is_found_for_each(tokens: int, share: float) -> None:
    mine = for_all_batches(plan())
    assert mine.find(tokens, int(tokens * share)) == mine.buckets[0]
