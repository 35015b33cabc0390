"""The KV cache changes how much is computed, and never what comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_runtime import LLM, SamplingParams

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE = 200


def load(tiny_checkpoint: MakeCheckpoint, family: str = "llama3", **options: Any) -> LLM:
    defaults: dict[str, Any] = {"kv_cache_tokens": 4096, "max_num_batched_tokens": 48}
    path = str(tiny_checkpoint(family))
    return LLM(path, skip_tokenizer_init=True, **(defaults | options))


def tokens_of(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[list[int]]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    engine = llm.engine
    engine.scheduler.check_integrity()
    engine.kv_cache.check_integrity()
    assert engine.stats.kv_pages_used == 0
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def prompts_with_shared_beginnings(seed: int) -> list[list[int]]:
    """Whole pages, parts of pages, and a whole prompt in common."""
    generator = np.random.default_rng(seed)
    stem = generator.integers(0, VOCAB_SIZE, 80).tolist()
    tails = [generator.integers(0, VOCAB_SIZE, n).tolist() for n in (1, 5, 20, 40)]
    starts = [stem[:n] for n in (80, 64, 65, 63, 16, 15)]
    return [*starts, *(start + tail for start in starts for tail in tails), stem]


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_prefix_caching_changes_no_token(tiny_checkpoint: MakeCheckpoint, family: str) -> None:
    prompts = prompts_with_shared_beginnings(1)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=20)
    cached = load(tiny_checkpoint, family)
    plain = load(tiny_checkpoint, family, enable_prefix_caching=False)
    expected = tokens_of(plain, prompts, params)
    for _ in range(2):
        for size in (1, 4, len(prompts)):
            for i in range(0, len(prompts), size):
                assert tokens_of(cached, prompts[i : i + size], params) == expected[i : i + size]
    stats = cached.engine.stats
    assert 0 < stats.prefix_hit_tokens < stats.prefix_queried_tokens
    assert plain.engine.stats.prefix_hit_tokens == 0
    assert plain.engine.stats.kv_pages_cached == 0


def test_a_conversation_finds_its_own_past(tiny_checkpoint: MakeCheckpoint) -> None:
    """The answer's pages serve the next turn, too; the ledger says how many tokens that saved."""
    llm = load(tiny_checkpoint)
    params = SamplingParams(temperature=0, max_tokens=30)
    prompt = np.random.default_rng(2).integers(0, VOCAB_SIZE, 50).tolist()
    for turn in range(3):
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        ledger = output.outputs[0].ledger
        assert ledger is not None
        # All but the last token of the turn before, in whole pages.
        assert ledger.cached_tokens == ((len(prompt) - 4) // 16 * 16 if turn else 0)
        prompt = [*prompt, *output.outputs[0].token_ids, 1, 2, 3]


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "n": 2}])
def test_preemption_changes_no_token(
    tiny_checkpoint: MakeCheckpoint, fields: dict[str, Any], prefix_caching: bool
) -> None:
    """Ten requests that grow to 70 to 100 tokens each, in a cache for 160."""
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, VOCAB_SIZE, n).tolist() for n in range(20, 60, 4)]
    params = SamplingParams(max_tokens=50, logprobs=1, repetition_penalty=1.1, **fields)
    options: dict[str, Any] = {"max_model_len": 128, "enable_prefix_caching": prefix_caching}
    options["admission"] = "greedy"
    large = load(tiny_checkpoint, **options)
    small = load(tiny_checkpoint, kv_cache_tokens=160, **options)
    assert tokens_of(small, prompts, params) == tokens_of(large, prompts, params)
    assert small.engine.stats.preemptions > 0
    assert large.engine.stats.preemptions == 0


def test_preemption_in_the_middle_of_prompt_logprobs(tiny_checkpoint: MakeCheckpoint) -> None:
    generator = np.random.default_rng(4)
    prompts = [generator.integers(0, VOCAB_SIZE, 40).tolist() for _ in range(6)]
    params = SamplingParams(temperature=0, max_tokens=40, prompt_logprobs=1)
    wanted = [{"prompt_token_ids": prompt} for prompt in prompts]
    large = load(tiny_checkpoint, max_model_len=96)
    small = load(tiny_checkpoint, max_model_len=96, kv_cache_tokens=160, admission="greedy")
    for one, other in zip(
        small.generate(wanted, params), large.generate(wanted, params), strict=True
    ):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert len(one.prompt_logprobs) == 40
        for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert mine is not None
            assert theirs is not None
            assert mine.keys() == theirs.keys()
            for token, logprob in mine.items():
                assert logprob.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
    assert small.engine.stats.preemptions > 0


def test_more_requests_than_slots(tiny_checkpoint: MakeCheckpoint) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=10)
    few = load(tiny_checkpoint, max_num_seqs=3)
    assert tokens_of(few, prompts, params) == tokens_of(load(tiny_checkpoint), prompts, params)


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("chunk", [7, 32])
def test_pages_and_chunks_of_any_size(
    tiny_checkpoint: MakeCheckpoint, page_size: int, chunk: int
) -> None:
    prompts = prompts_with_shared_beginnings(5)
    params = SamplingParams(temperature=0, max_tokens=12)
    llm = load(tiny_checkpoint, page_size=page_size, max_prefill_chunk=chunk)
    assert tokens_of(llm, prompts, params) == tokens_of(load(tiny_checkpoint), prompts, params)
