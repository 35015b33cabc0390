"""A model on several ranks, what is asked of it, and the processes that it has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nf_runtime import LLM, RequestOutput, SamplingParams
from nf_runtime.replay import Replay

VOCAB_SIZE = 201  # which no number of ranks divides


def ranks_of(pid: int) -> dict[str, int]:
    """Processes of other ranks that a process has started and that have not ended, by name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except OSError:
            continue
        number, _, name = head.partition(" (")
        state, parent = tail.split()[:2]
        if int(parent) == pid and state != "Z" and name.startswith("nanoflow-rank"):
            found[name] = int(number)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def load(path: Path, size: int, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_tokens": 192}
    defaults |= {"max_model_len": 128, "max_num_batched_tokens": 48, "max_prefill_chunk": 13}
    return LLM(
        str(path),
        skip_tokenizer_init=True,
        admission="greedy",
        tensor_parallel_size=size,
        **defaults | options,
    )


_random = np.random.default_rng(0)
SHARED = _random.integers(0, VOCAB_SIZE, 32).tolist()
PROMPTS = [
    SHARED[: 16 * (i % 3)] + _random.integers(0, VOCAB_SIZE, length).tolist()
    for i, length in enumerate((1, 15, 16, 17, 40, 7))
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=5, max_tokens=14, n=2, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        seed=9,
        top_k=20,
        max_tokens=10,
        repetition_penalty=1.2,
        logprobs=2,
        prompt_logprobs=1,
        ignore_eos=True,
    ),
]


def run(llm: LLM) -> list[RequestOutput]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [PARAMS[i % 3] for i in range(len(PROMPTS))],
    )


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    return [
        logprob.logprob
        for output in outputs
        for row in [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        for logprob in (row or {}).values()
    ]


def check_tokens(path: Path, size: int, options: dict[str, Any], logs: Path) -> LLM:
    """With shared prefixes, forks, chunked prompts and preemptions, one iteration ahead or not."""
    plain = {"native_kernels"} & options.keys()
    with load(path, 1, **{name: options[name] for name in plain}) as llm:
        expected = run(llm)
    llm = load(path, size, replay_log_dir=str(logs), **options)
    engine = llm.engine
    assert sorted(ranks_of(os.getpid())) == [f"nanoflow-rank-{i}" for i in range(1, size)]
    for _ in range(2 if size == 2 else 1):  # the second time with a cache that is full
        outputs = run(llm)
        assert tokens(outputs) == tokens(expected)
        np.testing.assert_allclose(logprobs(outputs), logprobs(expected), atol=1e-3)
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert (stats.iterations_ahead > 20) == options.get("async_scheduling", True)
    if options.get("overlap", "off") != "off":
        assert stats.overlap_steps[options["overlap"]]["planned"] > 10
    engine.kv_cache.check_integrity()
    (log,) = logs.iterdir()
    replay = Replay(str(log))
    assert sum(1 for _ in replay.steps()) > 20
    assert replay.report.divergence is None
    return llm
