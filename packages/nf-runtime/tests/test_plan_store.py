"""Plan sets as files: found for what they were measured for, the newest first."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_graphs import small_config, small_graph

from nf_runtime.pipeline.plan import Bucket, PlanError, PlanSet, read_plan_set
from nf_runtime.pipeline.plan_store import (
    PlanTarget,
    default_directory,
    file_name,
    find_plan_set,
    find_policy,
    model_fingerprint,
)
from nf_runtime.pipeline.policy import Reason
from nf_runtime.pipeline.templates import co_resident, nanoflow, sequential

GRAPH = small_graph("dense")
MODEL = small_config("dense")
TARGET = PlanTarget(model_fingerprint(MODEL), "a device", "bfloat16")


def plan_set(target: PlanTarget = TARGET, gain: float | None = 1.25) -> PlanSet:
    return PlanSet(
        **target._asdict(),
        plans=(nanoflow(GRAPH), sequential(GRAPH)),
        buckets=(
            Bucket(tokens=(64, 128), plan="nanoflow", gain=gain),
            Bucket(tokens=(1, 63), plan="sequential"),
        ),
    )


def find(directory: Path, target: PlanTarget = TARGET) -> PlanSet | None:
    return find_plan_set(directory, **target._asdict())


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    made = plan_set()
    made.save(tmp_path / "plans" / file_name(made))
    assert find(tmp_path / "plans") == made
    assert [path.suffix for path in (tmp_path / "plans").iterdir()] == [".json"]


def test_there_need_be_no_directory(tmp_path: Path) -> None:
    assert find(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "other",
    [
        TARGET._replace(model="0123"),
        TARGET._replace(device="another device"),
        TARGET._replace(dtype="float32"),
        TARGET._replace(tensor_parallel_size=2),
    ],
)
def test_what_was_measured_for_something_else_is_not_found(
    tmp_path: Path, other: PlanTarget
) -> None:
    made = plan_set(other)
    made.save(tmp_path / file_name(made))
    assert find(tmp_path) is None
    assert find(tmp_path, other) == made
    assert file_name(made) != file_name(plan_set())


def test_the_newest_wins(tmp_path: Path) -> None:
    for age, gain in enumerate((1.1, 1.3, 1.2)):
        path = tmp_path / f"{gain}.json"
        plan_set(gain=gain).save(path)
        os.utime(path, (1e9 - age, 1e9 - age))
    found = find(tmp_path)
    assert found is not None
    assert found.buckets[0].gain == 1.1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"buckets": [{"plan": "x"}], "plans": []}', "\0"])
def test_a_damaged_file_is_left_out_with_a_line_that_names_it(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan_set().save(tmp_path / "good.json")
    os.utime(tmp_path / "good.json", (1, 1))
    (tmp_path / "damaged.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path) == plan_set()
    (record,) = caplog.records
    assert "damaged.json" in record.getMessage()


def test_a_set_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plans.json").mkdir()
    with pytest.raises(OSError, match=r"plans\.json"):
        plan_set().save(tmp_path / "plans.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]


def test_the_fingerprint_is_of_shapes_alone() -> None:
    assert model_fingerprint(replace(MODEL, eos_token_ids=(3,))) == TARGET.model
    assert model_fingerprint(replace(MODEL, num_layers=7)) != TARGET.model


def test_the_directory_follows_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/nanoflow/plans")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "nanoflow" / "plans"


def policy(overlap: str, plan_dir: Path) -> tuple[str, str, str]:
    """What is said, and the plan of 100 tokens with the reason."""
    found = find_policy(
        overlap,
        graph=GRAPH,
        model=MODEL,
        device=TARGET.device,
        dtype=TARGET.dtype,
        plan_dir=str(plan_dir),
    )
    choice = found.choose(100, 100)
    return found.describe(overlap), choice.plan.name, str(choice.reason)


def test_auto_without_plans_says_how_to_measure_some(tmp_path: Path) -> None:
    said = (
        "auto, no plans measured for this model on this device: sequential (nanoflow plan measure)"
    )
    assert policy("auto", tmp_path) == (said, "sequential", Reason.NO_PLAN)


def test_auto_takes_what_was_measured_to_be_faster(tmp_path: Path) -> None:
    plan_set().save(tmp_path / "plans.json")
    said = "auto, of 2 kinds of batches nanoflow for 1; else sequential"
    assert policy("auto", tmp_path) == (said, "nanoflow", Reason.PLANNED)


@pytest.mark.parametrize("gain", [None, 0.9, 1.0])
def test_auto_leaves_alone_what_was_not(tmp_path: Path, gain: float | None) -> None:
    plan_set(gain=gain).save(tmp_path / "plans.json")
    said = "auto, no plan was measured to be faster: sequential"
    assert policy("auto", tmp_path) == (said, "sequential", Reason.NO_GAIN)


def test_words_and_files_are_described(tmp_path: Path) -> None:
    assert policy("off", tmp_path) == ("off: sequential", "sequential", Reason.OFF)
    assert policy("nanoflow", tmp_path) == ("nanoflow", "nanoflow", Reason.PLANNED)
    alone = tmp_path / "mine.json"
    alone.write_text(co_resident(GRAPH).model_dump_json())
    said = f"{alone}, plan co-resident"
    assert policy(str(alone), tmp_path) == (said, "co-resident", Reason.PLANNED)
    alone.write_text(sequential(GRAPH).model_dump_json())
    assert policy(str(alone), tmp_path) == (f"{alone}: sequential", "sequential", Reason.PLANNED)


def test_what_is_neither_a_word_nor_a_file_is_refused_with_the_words(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"overlap is 'nanoflo', .* one of auto, off, nano"):
        policy("nanoflo", tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan_set(tmp_path / "none.json")
