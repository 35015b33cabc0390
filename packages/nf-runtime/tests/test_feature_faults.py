"""The comparison of the feature matrix sees faults: each of them is made, and shows."""

import itertools
import json
import shutil
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from feature_cells import (
    PAGE,
    PROMPTS,
    Cell,
    answers_of,
    crowd_out,
    differences,
    generate,
    load,
    sampling_params,
)
from feature_checks import Open, References

from nf_kernels import native_status
from nf_kvcache.copier import CpuCopier, Download, Event, Layer
from nf_kvcache.stats import LowerTierStats
from nf_runtime.executor import stage
from nf_runtime.pipeline.division import Division
from nf_runtime.staged_batch import StagedBatch

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="lanes of a CPU need the native kernels"
)


def test_an_engine_that_is_not_closed_shows(tmp_path: Path, references: References) -> None:
    """Lanes are threads, and the SSD tier has files open."""
    cell = Cell("mistral", "nanoflow", 16, "large pool", "cache", "host and SSD", "greedy")
    references.of(cell)
    before = Open.now()
    llm, _ = load(references.checkpoint(cell.family), **cell.options(tmp_path))
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
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under plans; nf-kvcache shows it without an engine (`test_host_tier`)."""
    cell = Cell("mistral", mode, 64, "large pool", "cache", "host", "greedy")
    expected, _ = references.of(cell)
    params = sampling_params(cell.sampling, None)
    copier = HeldCopier(ordered=ordered)
    monkeypatch.setattr("nf_kvcache.kv_cache.make_copier", lambda device: copier)
    llm, _ = load(references.checkpoint(cell.family), **cell.options(tmp_path))
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
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And if nobody looked at checksums, the comparison would fail."""
    cell = Cell("mixtral", mode, None, "large pool", "cache", "host and SSD", "logprobs")
    expected, greedy = references.of(cell)
    path, params = references.checkpoint(cell.family), sampling_params(cell.sampling, greedy)

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
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell("mistral", mode, 64, "large pool", "no cache", "device", "greedy")
    expected, _ = references.of(cell)
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
    llm, _ = load(references.checkpoint(cell.family), **cell.options(tmp_path))
    with llm:
        outputs = generate(llm, PROMPTS, sampling_params(cell.sampling, None))
        assert swapped > 0
        assert differences(answers_of(outputs), expected) != []
