"""A replay log repeats every decision of an engine, and tells where a replay differs."""

import io
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_toy import RecordedToy

import nf_runtime.replay.replay as replay_module
from nf_kvcache import KVCache
from nf_runtime import LLM, ModelLoadError, NanoFlowError, SamplingParams
from nf_runtime.engine_types import EngineStats
from nf_runtime.loop import IterationLoop
from nf_runtime.pipeline.plan import Bucket, PlanError, PlanSet
from nf_runtime.pipeline.templates import sequential
from nf_runtime.replay import LogEnd, Replay, ReplayReport
from nf_runtime.replay.log_format import Tag
from nf_runtime.replay.log_reader import LogReader
from nf_runtime.replay.log_writer import LogWriter
from nf_scheduler import Scheduler, TokenBudget

MakeCheckpoint = Callable[..., Path]
MIB = 1 << 20
SMALL = {"kv_cache_tokens": 320, "max_model_len": 160, "max_num_batched_tokens": 48}
TIERS: dict[str, dict[str, Any]] = {
    "none": {},
    "host": {"kv_host_bytes": 4 * MIB},
    "disk": {"kv_host_bytes": MIB // 8, "kv_ssd_max_bytes": 64 * MIB},
}


@pytest.fixture
def record(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    """Give `record(**options) -> LLM`, which writes a log to `tmp_path / "logs"`."""
    llms: list[LLM] = []

    def make(**options: Any) -> LLM:
        defaults: dict[str, Any] = {"replay_log_dir": str(tmp_path / "logs"), "max_num_seqs": 8}
        path = str(tiny_checkpoint("llama3"))
        llms.append(LLM(path, skip_tokenizer_init=True, **(SMALL | defaults | options)))
        return llms[-1]

    yield make
    for llm in llms:
        llm.shutdown()


def logs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def conversation(llm: LLM, turns: int = 3, **params: Any) -> list[list[int]]:
    """Several users whose prompts grow by what was answered."""
    prompts = [[user] * 20 + list(range(user + 1)) for user in range(10)]
    answers = []
    for _ in range(turns):
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        options = {"temperature": 1.0, "seed": 7, "max_tokens": 24, "ignore_eos": True} | params
        outputs = llm.generate(inputs, SamplingParams(**options), use_tqdm=False)
        answers += [output.outputs[0].token_ids for output in outputs]
        prompts = [
            prompt + output.outputs[0].token_ids
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        while llm.engine.settle():
            pass
    return answers


def shut_down(llm: LLM) -> EngineStats:
    """End an engine, and say what it did."""
    stats = llm.engine.stats
    llm.shutdown()
    return stats


def assert_same(report: ReplayReport, stats: EngineStats) -> None:
    warm_up = 1
    assert (report.divergence, report.end) == (None, LogEnd.CLOSED)
    assert report.iterations == stats.iterations + warm_up
    assert report.preemptions == stats.preemptions


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("tiers", list(TIERS))
def test_an_engine_is_repeated(
    record: Callable[..., LLM], tmp_path: Path, tiers: str, tokens: bool, asynchronous: bool
) -> None:
    options = TIERS[tiers] | {"admission": "greedy"}
    if tiers == "disk":
        options["kv_ssd_dir"] = str(tmp_path / "disk")
    plain = conversation(record(replay_log_dir=None, async_scheduling=asynchronous))
    llm = record(replay_log_tokens=tokens, async_scheduling=asynchronous, **options)
    assert conversation(llm) == plain
    stats = shut_down(llm)
    assert_same(Replay(logs(tmp_path)[-1]).run(), stats)
    assert stats.preemptions > 0
    hits = stats.prefix_hit_tokens_by_tier
    assert all(hits[tier] > 0 for tier in ["device", "host", "disk"][: list(TIERS).index(tiers)])


def test_what_an_earlier_process_left_on_disk_is_repeated(
    record: Callable[..., LLM], tmp_path: Path
) -> None:
    options = TIERS["disk"] | {"kv_ssd_dir": str(tmp_path / "disk")}
    for _ in range(2):
        llm = record(**options)
        conversation(llm, turns=1)
        stats = shut_down(llm)
    assert stats.prefix_hit_tokens_by_tier["disk"] > 0
    first, second = logs(tmp_path)
    for path in (first, second):
        assert Replay(path).run().divergence is None


def test_batches_as_large_as_plans_want_them_are_repeated(
    record: Callable[..., LLM], tmp_path: Path
) -> None:
    plain = record(replay_log_dir=None)
    plan = sequential(plain.engine.graph)
    bucket = Bucket(tokens=(1, 1 << 20), plan=plan.name, token_budget=8, prefill_chunk=4)
    PlanSet(plans=(plan,), buckets=(bucket,)).save(tmp_path / "plans.json")
    expected = conversation(plain)
    llm = record(overlap=str(tmp_path / "plans.json"))
    assert conversation(llm) == expected
    assert llm.engine.stats.iterations > plain.engine.stats.iterations  # of fewer tokens each
    stats = shut_down(llm)
    assert_same(Replay(logs(tmp_path)[-1]).run(), stats)


def test_swapped_plans_have_batches_as_large_as_they_want_them(
    record: Callable[..., LLM], tmp_path: Path
) -> None:
    plain = record(replay_log_dir=None)
    plan = sequential(plain.engine.graph)
    bucket = Bucket(tokens=(1, 1 << 20), plan=plan.name, token_budget=8, prefill_chunk=4)
    PlanSet(plans=(plan,), buckets=(bucket,)).save(tmp_path / "plans.json")
    expected, iterations = conversation(plain), plain.engine.stats.iterations
    llm = record(overlap="off")
    before = 0
    for overlap in (str(tmp_path / "plans.json"), "off"):
        llm.engine.set_overlap(overlap)
        assert conversation(llm) == expected
        count, before = llm.engine.stats.iterations - before, llm.engine.stats.iterations
        assert (count > iterations) == (overlap != "off")
    with pytest.raises(PlanError, match="overlap is 'nothing'"):
        llm.engine.set_overlap("nothing")
    stats = shut_down(llm)
    assert_same(Replay(logs(tmp_path)[-1]).run(), stats)


@pytest.mark.parametrize("policy", ["priority", "shortest", "prefix", "slo"])
@pytest.mark.parametrize("admission", ["predict", "reserve", "greedy"])
def test_policies_and_admissions_are_repeated(
    record: Callable[..., LLM], tmp_path: Path, policy: str, admission: str
) -> None:
    levels = {"": {"ttft": 0.5, "tpot": 0.001}} if policy == "slo" else {}
    llm = record(policy=policy, admission=admission, service_levels=levels)
    conversation(llm, turns=2, n=2)
    stats = shut_down(llm)
    assert_same(Replay(logs(tmp_path)[-1]).run(), stats)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "step", "step", "step", "abort", "fail", "budgets"]),
        st.integers(0, 10_000),
    ),
    min_size=20,
    max_size=120,
)
SEEN: Counter[str] = Counter()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=ACTIONS,
    tiers=st.sampled_from(["none", "host", "disk"]),
    asynchronous=st.booleans(),
    tokens=st.booleans(),
    policy=st.sampled_from(["fcfs", "shortest", "prefix", "priority"]),
    seed=st.integers(0, 1000),
)
def check_anything_is_repeated(
    tmp_path_factory: pytest.TempPathFactory,
    actions: list[tuple[str, int]],
    tiers: str,
    asynchronous: bool,
    tokens: bool,
    policy: str,
    seed: int,
) -> None:
    directory = tmp_path_factory.mktemp("toy")
    toy = RecordedToy(
        directory,
        seed,
        num_pages=26,
        tiers=tiers,
        policy=policy,
        async_scheduling=asynchronous,
        replay_log_tokens=tokens,
        max_num_seqs=5,
        max_num_batched_tokens=12,
        max_num_queued_reqs=6,
        admission="greedy",
    )
    names: list[str] = []
    for action, number in actions:
        if action == "add":
            add(toy, names, number)
        elif action == "abort" and names:
            toy.loop.abort(names[number % len(names)])
        elif action == "budgets":
            budget = TokenBudget(1 + number % 4, 4 + number % 9, 1 + number % 6)
            toy.loop.set_budgets((budget,) if number % 3 else ())
        elif action == "fail":
            toy.runner.fails_next = number % 5 == 0
            toy.runner.is_broken = number % 7 == 0
        toy.step() if action == "step" and toy.scheduler.has_work else None
    toy.finish()
    toy.scheduler.check_integrity()
    report = Replay(toy.log).run()
    assert report.divergence is None
    assert report.end is LogEnd.CLOSED
    assert report.refused == toy.refused
    assert report.preemptions == toy.scheduler.num_preemptions
    count(toy, report)
    shutil.rmtree(directory)


def add(toy: RecordedToy, names: list[str], number: int) -> None:
    """A request of some kind; many begin alike, some fork, some have little time."""
    name = f"{number % 9}-{len(names)}"
    prompt = ([number % 3] * 30 + [number % 7] * 20)[number % 25 :]
    forked = bool(names) and number % 5 == 0
    toy.add(
        name,
        prompt,
        max_tokens=1 + number % 30,
        min_tokens=number % 4,
        stop_token_ids=frozenset({3} if number % 2 else ()),
        reuse_prefix=number % 11 > 0,
        cache_salt="secret" if number % 6 == 0 else "",
        priority=number % 3,
        tenant=f"tenant-{number % 4}",
        deadline=time.monotonic() + 0.01 if number % 13 == 0 else None,
        fork_of=names[-1] if forked else None,
    )
    names.append(name)


def count(toy: RecordedToy, report: ReplayReport) -> None:
    """What the examples have been through, so that none of it is missing."""
    stats = toy.cache.stats()
    SEEN.update(toy.ended.values())
    SEEN["preempted"] += report.preemptions > 0
    SEEN["failed"] += toy.num_failures > 0
    SEEN["refused"] += report.refused > 0
    for tier, hits in stats.hit_tokens_by_tier.items():
        SEEN[f"hit in {tier}"] += hits > 0
    SEEN["restore cut"] += stats.lower is not None and stats.lower.restores_cut > 0


def test_anything_is_repeated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random requests, aborts and failures, over copies that are late or fail and a real disk."""
    SEEN.clear()
    check_anything_is_repeated(tmp_path_factory)
    # Hits below the device, restores that are cut and missed deadlines come as copies and clock
    # like; `test_an_engine_is_repeated` has such hits for certain.
    for event in ("stop", "length", "abort", "preempted", "refused", "failed", "hit in device"):
        assert SEEN[event], SEEN


# Where a replay differs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of an engine that was short of pages."""
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": 12, "admission": "greedy"}
    toy = RecordedToy(tmp_path, 0, num_pages=26, tiers="host", max_num_queued_reqs=9, **limits)
    names: list[str] = []
    for number in range(24):
        add(toy, names, 28 + 30 * number)
        toy.step()
    assert toy.refused
    toy.loop.abort(names[-1])
    toy.finish()
    assert toy.scheduler.num_preemptions > 0
    assert Replay(toy.log).run().divergence is None
    return toy.log


def with_scheduler(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let replays run with other limits than the log says."""
    make = replay_module.make_scheduler

    def make_other(config: Any, *args: Any, **options: Any) -> Scheduler:
        return make(type(config)(**(config.to_dict() | changes)), *args, **options)

    monkeypatch.setattr(replay_module, "make_scheduler", make_other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_batched_tokens": 11}, r"iteration \d+ has .* requests .*, and in the log "),
        ({"policy": "shortest"}, r"iteration \d+ has "),
        ({"max_num_queued_reqs": 1}, r"request '.*' is refused, which it was not"),
    ],
)
def test_another_scheduler_is_noticed(
    log: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    with_scheduler(monkeypatch, **changes)
    report = Replay(log).run()
    assert report.end is None
    assert report.divergence is not None
    assert re.search(message, report.divergence), report.divergence
    assert re.match(r"after \d+ iterations and \d+\.\d{6} s, at byte \d+ of", report.divergence)


def test_a_cache_that_gives_other_pages_is_noticed(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = Replay(log)
    replay.kv_cache._device.pool._free.reverse()
    divergence = replay.run().divergence
    assert divergence is not None
    assert "has the requests and rows of the log, and other pages" in divergence


@pytest.mark.parametrize("tag", [Tag.CLOCK, Tag.EVENT, Tag.RESULT, Tag.ABORT])
def test_an_entry_that_is_missing_is_noticed(tmp_path: Path, log: Path, tag: Tag) -> None:
    """Negative control: each kind of input decides something, or is asked for in its turn."""
    start, stop = find_entry(log, tag)
    data = log.read_bytes()
    changed = tmp_path / "changed.replay"
    changed.write_bytes(data[:start] + data[stop:])
    report = Replay(changed).run()
    assert report.divergence is not None


def find_entry(log: Path, tag: Tag) -> tuple[int, int]:
    """Where an entry in the middle of a log begins and ends."""
    spans: list[tuple[int, int]] = []
    replay = Replay(log)
    cursor = replay._cursor
    expect, take = cursor.expect, cursor.take_command
    began: list[tuple[Tag, int]] = []

    def note(found: Tag, position: int) -> None:
        if began and began[-1][0] is tag:
            spans.append((began[-1][1], position))
        began.append((found, position))

    def noting_expect(found: Tag, wanted: str) -> Any:
        note(found, cursor.log.position)
        return expect(found, wanted)

    def noting_take() -> Tag:
        position = cursor.log.position
        command = take()
        note(command, position)
        return command

    cursor.expect, cursor.take_command = noting_expect, noting_take  # type: ignore[method-assign]
    replay.run()
    return spans[len(spans) // 2]


# How a log ends, and what it holds


def test_a_log_that_is_cut_anywhere_is_repeated_up_to_there(tmp_path: Path, log: Path) -> None:
    data = log.read_bytes()
    begin = data.index(b"}", data.index(b'"tokens"')) + 1
    cut = tmp_path / "cut.replay"
    iterations = []
    sizes = [*range(begin + 1, begin + 50, 3), *range(begin + 50, len(data), len(data) // 16)]
    for size in [*sizes, *range(len(data) - 20, len(data))]:
        cut.write_bytes(data[:size])
        try:
            report = Replay(cut).run()
        except NanoFlowError as error:
            assert "ends before the engine had started" in str(error)  # noqa: PT017
            assert not iterations
            continue
        assert (report.divergence, report.end) == (None, LogEnd.CUT)
        iterations.append(report.iterations)
    assert iterations == sorted(iterations)
    assert iterations[-1] > 20


def test_a_log_ends_at_its_bound_and_the_engine_goes_on(
    record: Callable[..., LLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = conversation(record(replay_log_dir=None))
    bound = 6000
    llm = record(replay_log_max_bytes=2 * bound)
    assert conversation(llm) == plain
    stats = shut_down(llm)
    (path,) = logs(tmp_path)
    assert bound - 1000 < path.stat().st_size <= bound
    report = Replay(path).run()
    assert (report.divergence, report.end) == (None, LogEnd.FULL)
    assert 0 < report.iterations < stats.iterations
    assert "is full; what comes from here on is not in it" in caplog.text


def test_older_logs_give_way(record: Callable[..., LLM], tmp_path: Path) -> None:
    for _ in range(4):
        llm = record(replay_log_max_bytes=10_000)
        conversation(llm, turns=1)
        llm.shutdown()
    sizes = [path.stat().st_size for path in logs(tmp_path)]
    assert 1 < len(sizes) < 4
    assert sum(sizes) <= 10_000


def test_a_disk_that_is_full_ends_the_log_alone(
    record: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    llm = record()
    writer = llm.engine._recorder.log  # type: ignore[union-attr]
    assert writer._file is not None
    writer._file.close()
    writer._file = io.FileIO("/dev/full", "wb")
    assert all(len(tokens) == 24 for tokens in conversation(llm, turns=1))
    assert "cannot be written, and ends here: No space left on device" in caplog.text


def test_what_is_written_in_part_ends_the_log(
    record: Callable[..., LLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a disk that gets full: nothing is appended to half of an entry."""

    class NearlyFull(io.FileIO):
        left = 1500

        def write(self, data: Any) -> int:
            part = bytes(data)[: self.left]
            self.left -= len(part)
            return super().write(part)

    monkeypatch.setattr(io, "FileIO", NearlyFull)
    llm = record()
    monkeypatch.undo()
    conversation(llm, turns=1)
    llm.shutdown()
    assert "cannot be written, and ends here: there is no room" in caplog.text
    (path,) = logs(tmp_path)
    assert path.stat().st_size == 1500
    report = Replay(path).run()
    assert (report.divergence, report.end) == (None, LogEnd.CUT)
    assert report.iterations > 0


def test_an_interrupt_in_the_middle_of_a_step_ends_the_log(
    record: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = record()
    commit = Scheduler.commit
    calls: list[int] = []

    def interrupted(self: Scheduler, result: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return commit(self, result)

    monkeypatch.setattr(Scheduler, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation(llm, turns=1)
    monkeypatch.undo()
    report = Replay(logs(tmp_path)[-1]).run()
    assert (report.divergence, report.end) == (None, LogEnd.INTERRUPTED)
    assert report.iterations >= 19


def test_a_fault_of_the_scheduler_is_repeated(
    record: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The incident that a log is for: the same exception, on a laptop, under a debugger."""
    grow = KVCache.grow

    def faulty(self: KVCache, seqs: list[str]) -> None:
        if "3" in "".join(seqs):
            raise RuntimeError("a fault")
        grow(self, seqs)

    monkeypatch.setattr(KVCache, "grow", faulty)
    llm = record()
    with pytest.raises(RuntimeError, match="a fault"):
        conversation(llm, turns=1)
    llm.shutdown()
    report = Replay(logs(tmp_path)[-1]).run()
    assert (report.divergence, report.end) == (None, LogEnd.CLOSED)
    monkeypatch.undo()
    divergence = Replay(logs(tmp_path)[-1]).run().divergence
    assert divergence is not None


def test_a_log_does_not_hold_what_was_said(tmp_path: Path) -> None:
    found = {}
    for tokens in (False, True):
        directory = tmp_path / str(tokens)
        toy = RecordedToy(directory, 0, num_pages=26, tiers="none", replay_log_tokens=tokens)
        prompt = [70001, 70002, 70003, 70004, 70005, 70006, 70007]
        toy.add("x", prompt, 8, cache_salt="my secret", tenant="my tenant", request_class="gout")
        toy.finish()
        data = toy.log.read_bytes()
        assert toy.log.stat().st_mode & 0o777 == 0o600
        assert b"gout" not in data  # what is no class of the engine could be anything
        token_bytes = [np.array(prompt, dtype="<i4").tobytes()]
        token_bytes += [np.array(prompt[i : i + 1], dtype="<i4").tobytes() for i in range(7)]
        found[tokens] = [text in data for text in (*token_bytes, b"my secret", b"my tenant")]
    assert not any(found[False])
    assert all(found[True])  # else this would look for the wrong thing


def test_logs_of_two_processes_have_nothing_in_common(tmp_path: Path) -> None:
    """Who knows a prompt cannot look for it: the key of the names is kept nowhere."""
    names = []
    for number in range(2):
        toy = RecordedToy(tmp_path / str(number), 0, num_pages=26, tiers="none")
        toy.add("x", list(range(8)), 1)
        toy.finish()
        requests = []
        replay = Replay(toy.log)
        replay._loop.add = requests.append  # type: ignore[method-assign]
        replay.run()
        names.append(requests[0].prompt_token_ids[[3, 7]].tolist())
    assert not set(names[0]) & set(names[1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is no replay log"),
        (b"# a README\n" * 9, "is no replay log"),
        (b"NFRL\x63\x02\x00\x00\x00{}", "of version 99, and this is NanoFlow for version 1"),
        (b"NFRL\x01\x02\x00\x00\x00{]", "is damaged: its header is no JSON"),
        (b"NFRL\x01\x02\x00\x00\x00{}", "is damaged: its header lacks 'tokens'"),
    ],
)
def test_what_is_no_log(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "x.replay"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(NanoFlowError, match=re.escape(message)):
        Replay(path)


def test_a_damaged_log(tmp_path: Path, log: Path) -> None:
    data = bytearray(log.read_bytes())
    start, _ = find_entry(log, Tag.STEP)
    data[start] = 0xFF
    path = tmp_path / "damaged.replay"
    path.write_bytes(data)
    with pytest.raises(NanoFlowError, match=rf"damaged at byte {start}: .* the kind 255"):
        Replay(path).run()


def test_a_directory_that_cannot_be_written(record: Callable[..., LLM], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError, match=r"replay_log_dir is .*, which cannot be used: "):
        record(replay_log_dir=str(tmp_path / "file"))
    with pytest.raises(NanoFlowError, match="replay_log_tokens is set, but there is no replay log"):
        record(replay_log_dir=None, replay_log_tokens=True)


@given(st.lists(st.integers(0, 2**64)), st.integers(-(2**40), 2**40), st.text())
def test_numbers_and_texts_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], value: int, text: str
) -> None:
    path = tmp_path_factory.mktemp("format") / "x.replay"
    writer = LogWriter(path, 1 << 20)
    writer.numbers(values)
    writer.signed(value)
    writer.text(text)
    writer.begin({"a": 1})
    writer.close(LogEnd.CLOSED)
    reader = LogReader(path)
    assert json.dumps(reader.header) == '{"a": 1}'
    assert (reader.numbers(), reader.signed(), reader.text()) == (values, value, text)
    assert reader.next_tag() is Tag.END


def test_no_log_is_written_unless_asked_for(record: Callable[..., LLM], tmp_path: Path) -> None:
    llm = record(replay_log_dir=None)
    assert type(llm.engine.loop) is IterationLoop
    assert not (tmp_path / "logs").exists()
