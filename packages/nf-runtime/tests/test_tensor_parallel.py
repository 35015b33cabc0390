"""Several ranks give the tokens of one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed
from ranked_llm import VOCAB_SIZE, check_tokens, load, ranks_of, run, tokens

from nf_kernels.collectives import connect
from nf_runtime import EngineConfig, SamplingParams
from nf_runtime.errors import ModelLoadError
from nf_runtime.loaded_model import load_model
from nf_runtime.measured import Load
from nf_runtime.parallelism import OUTPUTS
from nf_runtime.pipeline.plan import PlanError, for_all_batches
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.probe import Probe
from nf_runtime.ranks.following_sampler import FollowingSampler
from nf_runtime.ranks.frames import pack_iteration, unpack_iteration
from nf_runtime.sampler import RequestSampling, Sampler
from nf_scheduler import Batch

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not ranks_of(os.getpid())


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama-biased", 2, {}),
    (
        "llama-biased",
        2,
        {
            "tensor_parallel_output": "all_gather",
            "async_scheduling": False,
            "native_kernels": False,
        },
    ),
    ("llama-biased", 4, {"overlap": "off"}),
    ("llama-biased", 4, {"overlap": "two-batch"}),
    ("mixtral", 2, {"native_programs": False}),
    ("mixtral", 2, {"overlap": "two-batch"}),
    ("mixtral", 4, {"overlap": "two-batch", "expert_parallel": True}),
    ("qwen3-moe-sparse", 2, {"expert_parallel": True, "async_scheduling": False}),
]


@pytest.mark.parametrize(
    ("family", "size", "options"),
    CASES,
    ids=[f"{family}-{size}-{'-'.join(options)}" for family, size, options in CASES],
)
def test_several_ranks_give_the_tokens_of_one(
    family: str,
    size: int,
    options: dict[str, Any],
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    check_tokens(tiny_checkpoint(family, vocab_size=VOCAB_SIZE), size, options, tmp_path).shutdown()


def test_an_iteration_travels() -> None:
    batch = Batch(
        iteration=7,
        request_ids=["a", "größer"],
        slots=np.array([3, 1], dtype=np.int32),
        num_decodes=1,
        query_start=np.array([0, 1, 4], dtype=np.int32),
        context_lens=np.array([9, 0], dtype=np.int32),
        token_ids=np.array([-1, 5, 6, 7], dtype=np.int32),
        samples=np.array([True, False]),
    )
    tables = np.array([[4, 2, 0], [1, 0, 0]], dtype=np.int32)
    rows = np.array([2, 3])
    got = unpack_iteration(pack_iteration(batch, tables, rows, 5))
    assert got[0] == batch
    assert np.array_equal(got[1], tables)
    assert np.array_equal(got[2], rows)
    assert got[3] == 5


def test_more_than_two_ranks_are_not_deterministic(tiny_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ModelLoadError, match="sums over more than 2 ranks depend on what else"):
        load(tiny_checkpoint("llama3"), 4, deterministic=True)


def test_a_model_that_cannot_be_divided_starts_nothing(tiny_checkpoint: MakeCheckpoint) -> None:
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="must divide the model's 4 attention heads"):
        load(tiny_checkpoint("llama3"), 3)
    assert time.monotonic() - started < 2


def test_collectives_of_nano_batches(tiny_checkpoint: MakeCheckpoint) -> None:
    """On a lane of their own, on ranges of rows: both ranks, here as threads, get the same."""
    path = tiny_checkpoint("qwen3-moe-sparse", vocab_size=VOCAB_SIZE)
    lengths = [3, 9, 14, 6]
    starts = np.cumsum([0, *lengths])
    batch = Batch(
        iteration=0,
        request_ids=[str(i) for i in range(4)],
        slots=np.arange(4, dtype=np.int32),
        num_decodes=0,
        query_start=starts.astype(np.int32),
        context_lens=np.zeros(4, dtype=np.int32),
        token_ids=np.random.default_rng(1).integers(0, VOCAB_SIZE, starts[-1]).astype(np.int32),
        samples=np.ones(4, dtype=bool),
    )
    page_tables = np.arange(4, dtype=np.int32).reshape(4, 1)
    stores = {output: torch.distributed.HashStore() for output in OUTPUTS}

    def run_rank(rank: int, output: str) -> list[list[int]]:
        config = EngineConfig(
            model=str(path),
            tensor_parallel_size=2,
            tensor_parallel_output=output,
            max_num_batched_tokens=64,
        )
        loaded = load_model(config, rank)
        with connect(
            device="cpu", rank=rank, world_size=2, address=stores[output], timeout=30
        ) as communicator:
            kv_cache = loaded.make_kv_cache(4)
            sampler: Any = FollowingSampler(loaded.device)
            if rank == 0:
                size = {"vocab_size": VOCAB_SIZE, "max_requests": 8}
                sampler = Sampler(loaded.operations, device=loaded.device, **size)
                for name in batch.request_ids:
                    greedy = RequestSampling(
                        SamplingParams(temperature=0), 0, batch.token_ids[:1], frozenset()
                    )
                    sampler.add(name, greedy)
            executor = loaded.make_executor(kv_cache.layers, sampler, 64, communicator=communicator)
            sampled = []
            for name in ("sequential", "two-batch", "nanoflow"):
                plans = for_all_batches(TEMPLATES[name](loaded.graph))
                executor.set_policy(OverlapPolicy(loaded.graph, plans))
                executor.launch(batch, page_tables)
                sampled.append(executor.poll().result.token_ids.tolist())
            plans = for_all_batches(TEMPLATES["co-resident"](loaded.graph))
            with pytest.raises(PlanError, match="collectives on the lanes first, second"):
                executor.set_policy(OverlapPolicy(loaded.graph, plans))
            executor.close()
        return sampled

    with ThreadPoolExecutor(4) as pool:
        both = [pool.submit(run_rank, rank, output) for output in OUTPUTS for rank in (0, 1)]
        first, *others = [result.result() for result in both]
    assert first[0] == first[1] == first[2]
    assert len(set(first[0])) > 1
    assert all(other == first for other in others)


def test_swapped_plans_and_their_lanes_are_given_up_on_all_ranks(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    llm = load(
        tiny_checkpoint("mixtral", vocab_size=VOCAB_SIZE), 2, overlap="off", kv_cache_tokens=2048
    )
    with llm:
        group: Any = llm.engine._group
        own, other = (
            Path(f"/proc/{pid}/task") for pid in (os.getpid(), *ranks_of(os.getpid()).values())
        )
        expected = tokens(run(llm))
        without, plans = len(list(other.iterdir())), [len(group._plans)]
        threads = []
        for turn in range(6):
            plan = TEMPLATES["nanoflow"](llm.engine.graph)
            lanes = tuple(
                lane.model_copy(update={"share": 0.2 + turn / 10 * (i % 2)})
                for i, lane in enumerate(plan.lanes)
            )
            path = tmp_path / f"{turn}.json"
            path.write_text(plan.model_copy(update={"lanes": lanes}).model_dump_json())
            llm.engine.set_overlap(str(path))
            assert tokens(run(llm)) == expected
            threads.append(tuple(len(list(tasks.iterdir())) for tasks in (own, other)))
            plans.append(len(group._plans))
        assert all(many[0] <= threads[0][0] and many[1] == threads[0][1] for many in threads)
        assert threads[0][1] > without
        assert max(plans) <= 2
        with pytest.raises(PlanError, match="collectives on the lanes first, second"):
            llm.engine.set_overlap("co-resident")
        llm.engine.set_overlap("off")
        assert tokens(run(llm)) == expected
        assert len(list(other.iterdir())) == without


def test_the_network_between_ranks_is_measured(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint("llama-biased", vocab_size=VOCAB_SIZE)
    with load(path, 2, overlap="off", kv_cache_tokens=2048) as llm:
        expected = tokens(run(llm))  # of which the last iterations may still be waited for
        probe = Probe(llm.engine)
        assert probe.peaks.sent_per_second > 0
        plan = TEMPLATES["two-batch"](llm.engine.graph)
        sequential, measured = probe.measure([plan], Load(6, 20, 12), rounds=6)
        with pytest.raises(PlanError, match="collectives on the lanes first, second"):
            probe.measure([TEMPLATES["co-resident"](llm.engine.graph)], Load(6, 20, 12), rounds=1)
        probe.close()
        for one in (sequential, measured):
            assert one.network is not None
            assert one.network > 0
        assert sequential.overlaps == 0
        assert measured.overlaps > 0
        used = measured.traces[0].summary(probe.utilisation)
        assert used["network"] * probe.peaks.sent_per_second == pytest.approx(
            used["sent_per_second"]
        )
        assert tokens(run(llm)) == expected
