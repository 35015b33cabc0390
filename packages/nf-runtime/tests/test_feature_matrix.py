"""Features change no token, alone and together, and a cell where one did not act is a failure.

One matrix: how iterations are formed and planned, chunks, a pool that forces preemptions, the
prefix cache, tiers below the device, ways of sampling, on a dense model and a mixture of experts.
Every cell answers what the sequential cell without any of them answers, bit by bit. `feature_cells`
says what a cell is, and keeps a place for structured output, which the engine does not have yet.

What has to act, in every cell that has it: preemptions happen; prefixes are found, in the host
and on the SSD too; prompts come in several chunks; iterations are formed ahead, and run by their
plan. `test_the_lanes_of_a_plan_run_beside_each_other` shows the same of lanes.

Left out by construction are lower tiers without a prefix cache, which the config refuses.
"""

import itertools
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from feature_cells import (
    LARGE_POOL,
    PAGE,
    PROMPTS,
    VALUES,
    Answers,
    Cell,
    Open,
    all_cells,
    answers_of,
    check_chunks,
    check_mode,
    check_nothing_is_left,
    check_sampling,
    check_traces,
    covering_cells,
    crowd_out,
    differences,
    generate,
    load,
    reference_of,
    sampling_params,
)

from nf_kernels import native_status
from nf_kvcache.copier import CpuCopier, Download, Event, Layer
from nf_kvcache.stats import LowerTierStats
from nf_runtime import LLM
from nf_runtime.config import EngineConfig
from nf_runtime.errors import NanoFlowError
from nf_runtime.executor import stage
from nf_runtime.pipeline.division import Division
from nf_runtime.staged_batch import StagedBatch

MakeCheckpoint = Callable[..., Path]
Reference = Callable[[Cell], tuple[Answers, Answers]]

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="lanes of a CPU need the native kernels"
)


@pytest.fixture(scope="module")
def reference(
    tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Gives what the reference of a cell answers, and what that answers greedily."""
    nowhere = tmp_path_factory.mktemp("none")
    known: dict[Cell, Answers] = {}

    def answers(cell: Cell, greedy: Answers | None) -> Answers:
        plain = reference_of(cell)
        if plain not in known:
            options = plain.options(nowhere) | {"max_num_batched_tokens": 512}
            llm, _ = load(tiny_checkpoint(plain.family), **options)
            with llm:
                outputs = generate(llm, PROMPTS, sampling_params(plain.sampling, greedy))
                ledgers = [output.outputs[0].ledger for output in outputs]
                assert [ledger and ledger.prefill_chunks for ledger in ledgers] == [1] * len(
                    PROMPTS
                )
                assert llm.engine.stats.preemptions == 0
            known[plain] = answers_of(outputs)
        return known[plain]

    def both(cell: Cell) -> tuple[Answers, Answers]:
        greedy = answers(replace(cell, sampling="greedy"), None)
        return answers(cell, greedy), greedy

    return both


def run_cell(cell: Cell, path: Path, directory: Path, reference: Reference) -> None:
    """Run a cell, and hold all of it."""
    expected, greedy = reference(cell)
    check_sampling(cell, expected, greedy)
    params = sampling_params(cell.sampling, greedy)
    before = Open.now()
    llm, seen = load(path, **cell.options(directory))
    with llm:
        outputs = generate(llm, PROMPTS, params)
        assert differences(answers_of(outputs), expected) == []
        check_chunks(cell, seen, outputs)
        check_mode(cell, llm)
        assert (llm.engine.stats.preemptions > 0) == (cell.pool == "small pool"), "preemptions"
        check_nothing_is_left(llm)
        if cell.prefix == "cache":
            if cell.tier != "device":
                assert llm.engine.kv_cache.flush(10)
                crowd_out(llm)
            again = generate(llm, PROMPTS, params)
            assert differences(answers_of(again), expected) == []
            check_nothing_is_left(llm)
        check_hits(cell, llm)
        check_traces(llm, seen)
    if cell.tier == "host and SSD":
        llm, seen = load(path, **cell.options(directory))
        with llm:
            assert differences(answers_of(generate(llm, PROMPTS, params)), expected) == []
            assert llm.engine.stats.prefix_hit_tokens_by_tier["disk"] > 0, "hits on the SSD"
            check_nothing_is_left(llm)
            check_traces(llm, seen)
    before.check(directory)


def check_hits(cell: Cell, llm: LLM) -> None:
    """Prefixes were found where they were to be found."""
    stats = llm.engine.stats
    assert (stats.prefix_hit_tokens > 0) == (cell.prefix == "cache"), "hits"
    in_host = stats.prefix_hit_tokens_by_tier["host"]
    assert (in_host > 0) == (cell.tier != "device"), "hits in the host"


@pytest.mark.parametrize("cell", covering_cells(), ids=str)
def test_a_cell_answers_what_the_sequential_one_does(
    cell: Cell, tiny_checkpoint: MakeCheckpoint, tmp_path: Path, reference: Reference
) -> None:
    run_cell(cell, tiny_checkpoint(cell.family), tmp_path, reference)


@pytest.mark.long
@pytest.mark.parametrize("cell", all_cells(), ids=str)
def test_every_cell_answers_what_the_sequential_one_does(
    cell: Cell, tiny_checkpoint: MakeCheckpoint, tmp_path: Path, reference: Reference
) -> None:
    run_cell(cell, tiny_checkpoint(cell.family), tmp_path, reference)


def test_every_two_values_that_go_together_meet_in_the_covering_cells() -> None:
    """All pairs but those that no engine takes, and few cells for that."""
    apart = set()
    for (one, its), (other, others) in itertools.combinations(VALUES.items(), 2):
        for mine, theirs in itertools.product(its, others):
            if not any(
                (getattr(cell, one), getattr(cell, other)) == (mine, theirs)
                for cell in covering_cells()
            ):
                apart.add((mine, theirs))
    assert apart == {("no cache", "host"), ("no cache", "host and SSD")}
    assert len(covering_cells()) < len(all_cells()) / 20
    assert list(VALUES) == [each.name for each in fields(Cell)]


@pytest.mark.parametrize("tier", ["host", "host and SSD"])
def test_cells_that_are_left_out_are_those_that_the_config_refuses(
    tier: str, tmp_path: Path
) -> None:
    cell = Cell("mistral", "async", 16, "small pool", "cache", tier, "greedy")
    EngineConfig(model="any", **cell.options(tmp_path))
    refused = replace(cell, prefix="no cache")
    assert refused not in all_cells()
    with pytest.raises(NanoFlowError, match="the host and SSD tiers keep prefixes"):
        EngineConfig(model="any", **refused.options(tmp_path))


@pytest.mark.parametrize("mode", [mode for mode in VALUES["mode"] if mode not in ("sync", "async")])
def test_the_lanes_of_a_plan_run_beside_each_other(
    mode: str, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """By the times that were noted. Lanes that share cores take turns now and then, so it may come
    late; wide layers make it likely.
    """
    cell = Cell("mistral", mode, 16, "large pool", "no cache", "device", "greedy")
    path = tiny_checkpoint(cell.family, hidden_size=256, intermediate_size=512)
    llm, seen = load(path, **cell.options(tmp_path))
    with llm:
        deadline = time.monotonic() + 60
        while not seen.overlaps and time.monotonic() < deadline:
            generate(llm, PROMPTS, sampling_params(cell.sampling, None))
    assert seen.overlaps > 0


@pytest.mark.parametrize(
    ("mode", "tier", "override", "message"),
    [
        ("sync", "device", {"async_scheduling": True}, "iterations ahead"),
        ("async", "device", {"async_scheduling": False}, "iterations ahead"),
        ("async", "device", {"overlap": "nanoflow"}, "planned steps"),
        ("nanoflow", "device", {"overlap": "off"}, "planned steps"),
        ("pd-multiplex", "device", {"overlap": "co-resident"}, "planned steps"),
        ("async", "device", {"max_prefill_chunk": None}, "largest chunk"),
        ("async", "device", {"kv_cache_tokens": PAGE * LARGE_POOL}, "preemptions"),
        ("async", "device", {"enable_prefix_caching": False}, "hits"),
        ("async", "host", {"kv_host_bytes": None}, "hits in the host"),
        ("async", "host and SSD", {"kv_ssd_dir": None, "kv_ssd_max_bytes": None}, "on the SSD"),
    ],
)
def test_a_cell_whose_feature_does_not_act_fails(
    mode: str,
    tier: str,
    override: dict[str, Any],
    message: str,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokens are right, all the same: only what it looks for besides them tells."""
    cell = Cell("mistral", mode, 16, "small pool", "cache", tier, "greedy")
    reference(cell)
    options = Cell.options
    monkeypatch.setattr(
        Cell, "options", lambda self, directory: options(self, directory) | override
    )
    with pytest.raises(AssertionError, match=f"{message}\\n"):
        run_cell(cell, tiny_checkpoint(cell.family), tmp_path, reference)


def test_an_engine_that_is_not_closed_shows(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path, reference: Reference
) -> None:
    """Lanes are threads, and the SSD tier has files open."""
    cell = Cell("mistral", "nanoflow", 16, "large pool", "cache", "host and SSD", "greedy")
    reference(cell)
    before = Open.now()
    llm, _ = load(tiny_checkpoint(cell.family), **cell.options(tmp_path))
    generate(llm, PROMPTS[:3], sampling_params("greedy", None)[:3])
    with pytest.raises(AssertionError, match="threads are left"):
        before.check(tmp_path, patience=0.1)
    with pytest.raises(AssertionError, match="files are open"):
        replace(before, threads=Open.now().threads).check(tmp_path)
    llm.shutdown()
    before.check(tmp_path)


class HeldCopier(CpuCopier):
    """Copies to the host wait until they are let go.

    Args:
        ordered: Whether the computation waits for the copies of what it is about to overwrite, and
            lets them go for that. False takes the copy event away.
    """

    def __init__(self, *, ordered: bool) -> None:
        super().__init__(inline_bytes=0)
        self.gate = threading.Event()
        self._ordered = ordered

    def download(
        self, layers: Sequence[Layer], pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        self._thread.submit(lambda: self.gate.wait(60) and None)
        return super().download(layers, pages, targets)

    def hold(self, event: Event) -> None:
        if self._ordered:
            self.gate.set()
            super().hold(event)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("mode", ["async", "nanoflow", "co-resident"])
def test_without_the_copy_event_the_comparison_fails(
    mode: str,
    ordered: bool,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under plans; nf-kvcache shows it without an engine (`test_host_tier`)."""
    cell = Cell("mistral", mode, 64, "large pool", "cache", "host", "greedy")
    expected, _ = reference(cell)
    params = sampling_params(cell.sampling, None)
    copier = HeldCopier(ordered=ordered)
    monkeypatch.setattr("nf_kvcache.kv_cache.make_copier", lambda device: copier)
    llm, _ = load(tiny_checkpoint(cell.family), **cell.options(tmp_path))
    with llm:
        assert differences(answers_of(generate(llm, PROMPTS, params)), expected) == []
        crowd_out(llm)
        copier.gate.set()
        assert llm.engine.kv_cache.flush(10)
        again = answers_of(generate(llm, PROMPTS, params))
        assert llm.engine.stats.prefix_hit_tokens_by_tier["host"] > 0
        told = differences(again, expected)
        assert bool(told) != ordered, told


def flip_one_byte(directory: Path) -> None:
    """Change the sign of one number in the first page that the SSD has of the first prompt."""
    (index,) = directory.rglob("index.sqlite")
    (segment,) = directory.rglob("segment-*.kv")
    tokens = np.array(PROMPTS[0][:PAGE], dtype=np.int32).tobytes()
    connection = sqlite3.connect(index)
    ((slot,),) = connection.execute(
        "SELECT slot FROM page WHERE parent = 0 AND tokens = ?", (tokens,)
    )
    connection.close()
    (meta,) = directory.rglob("meta.json")
    place = slot * json.loads(meta.read_text())["slot_bytes"] + 3
    with open(segment, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x80]))


@pytest.mark.parametrize("mode", ["sync", "nanoflow-4", "pd-multiplex"])
def test_a_flipped_byte_on_the_ssd_is_a_miss(
    mode: str,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And if nobody looked at checksums, the comparison would fail."""
    cell = Cell("mixtral", mode, None, "large pool", "cache", "host and SSD", "logprobs")
    expected, greedy = reference(cell)
    path, params = tiny_checkpoint(cell.family), sampling_params(cell.sampling, greedy)

    def answer(directory: Path) -> tuple[list[str], int, LowerTierStats]:
        llm, _ = load(path, **cell.options(directory))
        with llm:
            told = differences(answers_of(generate(llm, PROMPTS, params)), expected)
            stats = llm.engine.stats
            assert stats.lower_tiers is not None
            return told, stats.prefix_hit_tokens_by_tier["disk"], stats.lower_tiers

    whole, damaged, unchecked = (tmp_path / name for name in ("whole", "damaged", "unchecked"))
    assert answer(whole)[:2] == ([], 0)
    shutil.copytree(whole, damaged)
    flip_one_byte(damaged)
    shutil.copytree(damaged, unchecked)

    told, hits, _ = answer(whole)
    assert told == []
    told, hits_of_damaged, lower = answer(damaged)
    assert told == []
    lost = (len(PROMPTS[0]) - 1) // PAGE * PAGE  # all pages of the prompt build on this one
    assert 0 < hits_of_damaged == hits - lost
    assert lower.disk is not None
    assert lower.disk.pages_damaged > 0
    assert lower.restores_cut == 1
    monkeypatch.setattr("nf_kvcache.disk.disk_read.page_checksum", lambda *_: mock.ANY)
    told, hits_of_unchecked, _ = answer(unchecked)
    assert hits_of_unchecked == hits
    assert told != []


@pytest.mark.parametrize("mode", ["nanoflow", "nanoflow-4", "pd-multiplex", "co-resident"])
def test_two_nano_batches_with_each_others_outputs_fail_the_comparison(
    mode: str,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell("mistral", mode, 64, "large pool", "no cache", "device", "greedy")
    expected, _ = reference(cell)
    swapped = 0

    def stage_swapped(batch: Any, division: Division, *arguments: Any) -> StagedBatch:
        """Rows whose logits are wanted: those of the first two nano-batches in turn."""
        nonlocal swapped
        staged = stage(batch, division, *arguments)
        rows = staged.buffer.host("SELECTED_ROWS").numpy()
        first, second, *_ = (
            (
                np.flatnonzero((rows >= low) & (rows < high))
                for low, high in itertools.pairwise(division.bounds)
                if low < high
            )
            if division.num_occupied > 1
            else ([], [])
        )
        for mine, other in zip(first, second, strict=False):
            rows[[mine, other]] = rows[[other, mine]]
            swapped += 1
        return staged

    monkeypatch.setattr("nf_runtime.executor.stage", stage_swapped)
    llm, _ = load(tiny_checkpoint(cell.family), **cell.options(tmp_path))
    with llm:
        outputs = generate(llm, PROMPTS, sampling_params(cell.sampling, None))
        assert swapped > 0
        assert differences(answers_of(outputs), expected) != []
