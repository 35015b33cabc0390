"""What the tiers below the device are worth, and what they cost, on a model of 275 M parameters."""

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_kernels import native_status
from nf_runtime import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="needs the native kernels: plain torch takes minutes"
)

# Tokens of (question, answer) in four rounds of 32 conversations: consecutive requests of LMSYS
# Chat, from the first on, four at a time, without those that exceed 2,000 tokens together.
CONVERSATIONS = [
    [(107, 15), (396, 513), (18, 222), (18, 104)], [(71, 327), (40, 95), (48, 816), (2, 10)],
    [(83, 675), (2, 10), (25, 77), (9, 307)], [(8, 25), (6, 347), (13, 513), (30, 897)],
    [(39, 25), (637, 89), (11, 19), (398, 513)], [(259, 100), (65, 239), (2, 16), (185, 52)],
    [(64, 472), (48, 316), (4, 7), (5, 87)], [(53, 513), (123, 91), (38, 358), (28, 159)],
    [(160, 542), (4, 28), (9, 513), (7, 119)], [(72, 566), (82, 292), (9, 109), (299, 513)],
    [(14, 102), (38, 483), (14, 8), (88, 322)], [(11, 35), (34, 25), (8, 182), (2, 38)],
    [(10, 186), (24, 459), (4, 18), (32, 92)], [(15, 264), (6, 323), (16, 347), (364, 287)],
    [(322, 33), (14, 39), (62, 894), (2, 20)], [(31, 46), (16, 150), (10, 102), (19, 451)],
    [(29, 42), (539, 514), (10, 113), (41, 512)], [(8, 45), (8, 246), (20, 483), (27, 5)],
    [(20, 202), (26, 22), (11, 57), (273, 513)], [(29, 188), (11, 138), (20, 107), (17, 242)],
    [(8, 10), (87, 539), (46, 18), (64, 472)], [(96, 234), (15, 149), (2, 9), (110, 441)],
    [(10, 284), (18, 682), (10, 371), (8, 263)], [(71, 18), (40, 747), (11, 530), (12, 57)],
    [(22, 30), (16, 513), (12, 477), (238, 42)], [(146, 574), (448, 287), (22, 73), (204, 170)],
    [(407, 267), (364, 139), (24, 355), (13, 342)], [(8, 267), (12, 473), (280, 14), (10, 513)],
    [(74, 31), (362, 3), (8, 153), (98, 75)], [(61, 46), (285, 48), (14, 282), (19, 513)],
    [(140, 513), (52, 89), (24, 59), (276, 758)], [(25, 445), (26, 285), (13, 10), (29, 16)],
]  # fmt: skip
WORKING_SET = sum(question + answer for rounds in CONVERSATIONS for question, answer in rounds)
MIB = 1 << 20
PREFIX_TOKENS = 2000


def make_llm(model: Path, **options: Any) -> LLM:
    return LLM(str(model), load_format="dummy", skip_tokenizer_init=True, **options)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def converse(llm: LLM) -> tuple[int, float, list[list[int]]]:
    """All conversations, round by round.

    Returns:
        Tokens of prompts that were computed; seconds; all tokens of each conversation.
    """
    rng = np.random.default_rng(0)
    vocab_size = llm.engine.info.vocab_size
    histories: list[list[int]] = [[] for _ in CONVERSATIONS]
    before = llm.engine.stats.iteration_tokens
    decoded = 0
    started = time.perf_counter()
    for lengths in zip(*CONVERSATIONS, strict=True):
        for history, (question, _) in zip(histories, lengths, strict=True):
            history += rng.integers(1, vocab_size, question).tolist()
        prompts = [{"prompt_token_ids": list(history)} for history in histories]
        params = [greedy(answer) for _, answer in lengths]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for history, output in zip(histories, outputs, strict=True):
            history += output.outputs[0].token_ids
        decoded += sum(answer - 1 for _, answer in lengths)
    seconds = time.perf_counter() - started
    return llm.engine.stats.iteration_tokens - before - decoded, seconds, histories


def test_conversations_of_four_rounds(benchmark: Any, llama_300m_dir: Path, tmp_path: Path) -> None:
    """A device pool of a quarter of the working set; a round of all conversations, then the next.

    Without tiers a conversation's KV is gone when its next round comes.
    """
    pool = {"kv_cache_tokens": WORKING_SET // 4 // 16 * 16, "max_num_seqs": 16}
    with make_llm(llama_300m_dir, **pool) as llm:
        without, seconds_without, expected = converse(llm)
    tiers = {
        "kv_host_bytes": 128 * MIB,
        "kv_ssd_dir": str(tmp_path),
        "kv_ssd_max_bytes": 2048 * MIB,
    }
    with make_llm(llama_300m_dir, **pool, **tiers) as llm:
        computed, seconds, histories = converse(llm)
        stats = llm.engine.stats
    assert histories == expected
    assert stats.lower_tiers is not None
    assert stats.lower_tiers.disk is not None
    benchmark.pedantic(lambda: None, rounds=1)
    hits = stats.prefix_hit_tokens_by_tier
    benchmark.extra_info |= {
        "working set": f"{WORKING_SET} tokens, a pool of {pool['kv_cache_tokens']}",
        "prompt tokens computed without tiers": without,
        "with tiers": computed,
        "ratio": round(without / computed, 2),
        "at least": 2.5,
        **{f"hits in {tier}, tokens": count for tier, count in hits.items()},
        "seconds without and with": f"{seconds_without:.1f} and {seconds:.1f}",
        "SSD MiB written": stats.lower_tiers.disk.bytes_written // MIB,
        "SSD MiB read": stats.lower_tiers.disk.bytes_read // MIB,
        "writes dropped": sum(stats.lower_tiers.disk.writes_dropped.values()),
        "preemptions": stats.preemptions,
    }
    assert hits["disk"] > 0
    assert without / computed >= 2.5


def test_eager_offload_beside_none(benchmark: Any, llama_300m_dir: Path, tmp_path: Path) -> None:
    """The same requests with and without lower tiers, in turns; nothing is ever found."""
    options = {"kv_cache_tokens": 16384, "max_num_seqs": 32}
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 1024 * MIB}
    engines = {
        "none": make_llm(llama_300m_dir, **options),
        "host": make_llm(llama_300m_dir, kv_host_bytes=256 * MIB, **options),
        "host and SSD": make_llm(llama_300m_dir, kv_host_bytes=256 * MIB, **ssd, **options),
    }
    lengths = [(200, 60), (40, 120), (350, 30), (90, 90)] * 8
    rng = np.random.default_rng(0)
    vocab_size = engines["none"].engine.info.vocab_size
    seconds: dict[str, list[float]] = {name: [] for name in engines}

    def measure() -> None:
        prompts = [
            {"prompt_token_ids": rng.integers(1, vocab_size, prompt).tolist()}
            for prompt, _ in lengths
        ]
        params = [greedy(answer) for _, answer in lengths]
        for name, llm in engines.items():
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds[name].append(time.perf_counter() - started)

    measure()  # the first one also touches all memory for the first time
    for times in seconds.values():
        times.clear()
    benchmark.pedantic(measure, rounds=7)
    shares = {
        name: statistics.median(
            plain / tiered for plain, tiered in zip(seconds["none"], times, strict=True)
        )
        for name, times in seconds.items()
    }
    tokens = sum(prompt + answer for prompt, answer in lengths)
    lower = engines["host"].engine.stats.lower_tiers
    assert lower is not None
    benchmark.extra_info |= {
        "tokens/s without": round(tokens / statistics.median(seconds["none"])),
        **{f"{name}, of none": round(share, 3) for name, share in shares.items()},
        "at least": 0.95,
        "MiB to the host": lower.downloaded_bytes // MIB,
        "pages skipped": lower.skipped_pages,
    }
    for llm in engines.values():
        llm.shutdown()
    assert lower.downloaded_bytes > 8 * tokens * 20480 * 0.9
    assert shares["host"] >= 0.95
    assert shares["host and SSD"] >= 0.95


def first_token(llm: LLM, prompt: list[int]) -> tuple[float, RequestOutput]:
    """Seconds until the only token of an answer."""
    started = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": prompt}, greedy(1), use_tqdm=False)
    return time.perf_counter() - started, output


def hits(output: RequestOutput, tier: str) -> int:
    ledger = output.outputs[0].ledger
    assert ledger is not None
    return ledger.cached_tokens_by_tier.get(tier, 0)


def test_restoring_a_prefix_beside_computing_it(
    benchmark: Any, llama_300m_dir: Path, tmp_path: Path
) -> None:
    """Time to the first token after a prompt of 2,000 tokens: computed, from the host, from SSD.

    What is restored includes an iteration for the last token of the prompt.
    """
    options = {"kv_cache_tokens": 2048, "max_num_seqs": 1, "max_num_batched_tokens": 2048}
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 1024 * MIB}
    engines = {
        "computed": make_llm(llama_300m_dir, enable_prefix_caching=False, **options),
        "host": make_llm(llama_300m_dir, kv_host_bytes=512 * MIB, **options),
        "disk": make_llm(llama_300m_dir, kv_host_bytes=48 * MIB, **ssd, **options),
    }
    rng = np.random.default_rng(0)
    vocab_size = engines["computed"].engine.info.vocab_size
    prompt, *others = rng.integers(1, vocab_size, (5, PREFIX_TOKENS)).tolist()
    crowd = itertools.cycle(others)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    reference = None

    def measure() -> None:
        nonlocal reference
        for name, llm in engines.items():
            if name != "computed":
                for _ in range(2):  # takes the pages of the device and, of the small one, the host
                    first_token(llm, next(crowd))
                    assert llm.engine.kv_cache.flush(60)
            took, output = first_token(llm, prompt)
            seconds[name].append(took)
            reference = reference or output.outputs[0].token_ids
            assert output.outputs[0].token_ids == reference
            if len(seconds[name]) > 1 and name != "computed":
                assert hits(output, name) > PREFIX_TOKENS - 50, output.outputs[0].ledger
            assert llm.engine.kv_cache.flush(60)

    measure()  # stores the prefix
    benchmark.pedantic(measure, rounds=7)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    faster = {name: median["computed"] / median[name] for name in ("host", "disk")}
    benchmark.extra_info |= {
        **{f"{name}, ms": round(1000 * value, 1) for name, value in median.items()},
        **{f"{name}, times faster": round(value, 1) for name, value in faster.items()},
        "at least": "host 15, disk 5",
    }
    for llm in engines.values():
        llm.shutdown()
    assert faster["host"] >= 15
    assert faster["disk"] >= 5
