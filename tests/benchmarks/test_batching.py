"""What continuous batching is worth: 32 requests together against one after another."""

import time
from pathlib import Path

import numpy as np
import pytest

from nf_runtime import LLM, SamplingParams

REQUESTS = 32
PROMPT_TOKENS = 32
NEW_TOKENS = 32


def random_prompts(count: int, length: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Prompts that share no prefix."""
    ids = np.random.default_rng(0).integers(1, vocab_size, (count, length))
    return [{"prompt_token_ids": row.tolist()} for row in ids]


def measure(llm: LLM, benchmark: object, least: float) -> None:
    prompts = random_prompts(REQUESTS, PROMPT_TOKENS, llm.engine.info.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    seconds: dict[str, list[float]] = {"batched": [], "serial": []}

    def batched() -> None:
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds["batched"].append(time.perf_counter() - started)

    # Interleaved: a batched run, an eighth of the serial one, and so on.
    for start in range(0, REQUESTS, REQUESTS // 8):
        batched()
        started = time.perf_counter()
        for prompt in prompts[start : start + REQUESTS // 8]:
            llm.generate(prompt, params, use_tqdm=False)
        seconds["serial"].append(time.perf_counter() - started)
    benchmark.pedantic(batched, rounds=1)
    tokens = REQUESTS * NEW_TOKENS
    batched_rate = tokens / float(np.median(seconds["batched"]))
    serial_rate = tokens / sum(seconds["serial"])
    benchmark.extra_info.update(
        {
            "batched tokens/s": round(batched_rate, 1),
            "serial tokens/s": round(serial_rate, 1),
            "ratio": round(batched_rate / serial_rate, 2),
            "at least": least,
        }
    )
    assert batched_rate / serial_rate >= least


@pytest.fixture(scope="module")
def options() -> dict[str, object]:
    # Without the prefix cache, or the second run would not compute its prompts.
    return {"skip_tokenizer_init": True, "enable_prefix_caching": False, "max_num_seqs": REQUESTS}


def test_batching_of_the_demo_model(
    benchmark: object, demo_model_dir: Path, options: dict[str, object]
) -> None:
    measure(LLM(str(demo_model_dir), **options), benchmark, least=4.0)


def test_batching_of_a_300m_model(
    benchmark: object, llama_300m_dir: Path, options: dict[str, object]
) -> None:
    llm = LLM(str(llama_300m_dir), load_format="dummy", **options)
    measure(llm, benchmark, least=10.0)
