"""A minute of benchmarks that every change runs; `make bench-check` compares them by ratio."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nf_kvcache import KVCache, KVLayout
from nf_runtime import LLM, SamplingParams
from nf_scheduler import IterationResult, Request, Scheduler, SchedulerConfig

pytestmark = pytest.mark.smoke


@pytest.mark.benchmark(group="calibration")
def test_calibration(benchmark: object) -> None:
    """Some of what the others do, from torch and Python alone: the unit of their times."""
    matrix = torch.randn(512, 512)
    small = torch.randn(8, 64)

    def loop() -> float:
        total = 0.0
        for i in range(80):
            torch.mm(matrix, matrix)
            for _ in range(20):
                torch.add(small, small)
            total += sum(range(i))
        return total

    benchmark.pedantic(loop, rounds=7, warmup_rounds=1)


@pytest.fixture(scope="module")
def demo(demo_model_dir: Path) -> LLM:
    return LLM(str(demo_model_dir), enable_prefix_caching=False, kv_cache_tokens=65536)


@pytest.mark.parametrize("requests", [1, 32])
def test_decode(benchmark: object, demo: LLM, requests: int) -> None:
    prompts = [{"prompt_token_ids": [i + 1] * 8} for i in range(requests)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    benchmark.pedantic(
        lambda: demo.generate(prompts, params, use_tqdm=False), rounds=9, warmup_rounds=2
    )


def test_sampled_decode(benchmark: object, demo: LLM) -> None:
    """As above, with every request sampling under a filter."""
    prompts = [{"prompt_token_ids": [i + 1] * 8} for i in range(32)]
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=32, ignore_eos=True)
    benchmark.pedantic(
        lambda: demo.generate(prompts, params, use_tqdm=False), rounds=9, warmup_rounds=2
    )


def test_prefill(benchmark: object, demo: LLM) -> None:
    prompts = [{"prompt_token_ids": [i + 1] * 512} for i in range(8)]
    params = SamplingParams(temperature=0, max_tokens=1)
    benchmark.pedantic(
        lambda: demo.generate(prompts, params, use_tqdm=False), rounds=9, warmup_rounds=2
    )


def test_scheduling(benchmark: object) -> None:
    """64 running requests on a real page cache, without a model."""
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)

    def run() -> None:
        cache = KVCache(layout, 2048)
        scheduler = Scheduler(cache, SchedulerConfig(max_model_len=512, max_num_seqs=64))
        for i in range(64):
            prompt = np.full(16, i, dtype=np.int32)
            scheduler.add(Request(f"r{i}", prompt, max_tokens=256))
        while (batch := scheduler.schedule()) is not None:
            cache.page_tables(batch.request_ids)
            tokens = np.ones(len(batch), dtype=np.int32)
            scheduler.commit(IterationResult(batch.iteration, tokens))

    benchmark.pedantic(run, rounds=9, warmup_rounds=2)
