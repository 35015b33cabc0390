"""Features change no token, alone and together, and a cell where one did not act is a failure.

One matrix: how iterations are formed and planned, chunks, a pool that forces preemptions, the
prefix cache, tiers below the device, ways of sampling, on a dense model and a mixture of experts.
Every cell answers what the sequential cell without any of them answers, bit by bit. `feature_cells`
says what a cell is, and keeps a place for structured output, which the engine does not have yet;
`feature_checks` says what is held of it, and `test_feature_faults` that faults show.

What has to act, in every cell that has it: preemptions happen; prefixes are found, in the host
and on the SSD too; prompts come in several chunks; iterations are formed ahead, and run by their
plan. `test_the_lanes_of_a_plan_run_beside_each_other` shows the same of lanes.

Left out by construction are lower tiers without a prefix cache, which the config refuses.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from feature_cells import (
    LARGE_POOL,
    PAGE,
    PROMPTS,
    VALUES,
    Cell,
    all_cells,
    covering_cells,
    generate,
    load,
    sampling_params,
)
from feature_checks import References, run_cell

from nf_kernels import native_status
from nf_runtime.config import EngineConfig
from nf_runtime.errors import NanoFlowError

MakeCheckpoint = Callable[..., Path]

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="lanes of a CPU need the native kernels"
)


@pytest.mark.parametrize("cell", covering_cells(), ids=str)
def test_a_cell_answers_what_the_sequential_one_does(
    cell: Cell, tmp_path: Path, references: References
) -> None:
    run_cell(cell, tmp_path, references)


@pytest.mark.long
@pytest.mark.parametrize("cell", all_cells(), ids=str)
def test_every_cell_answers_what_the_sequential_one_does(
    cell: Cell, tmp_path: Path, references: References
) -> None:
    run_cell(cell, tmp_path, references)


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
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokens are right, all the same: only what it looks for besides them tells."""
    cell = Cell("mistral", mode, 16, "small pool", "cache", tier, "greedy")
    references.of(cell)
    options = Cell.options
    monkeypatch.setattr(
        Cell, "options", lambda self, directory: options(self, directory) | override
    )
    with pytest.raises(AssertionError, match=f"{message}\\n"):
        run_cell(cell, tmp_path, references)
