"""Throughput on requests of real lengths, and how much of the compute bound that is."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nf_kernels import native_status, num_threads, ops
from nf_runtime import LLM, SamplingParams

# Tokens of prompt and answer of the first 48 conversations of ShareGPT that fit 2,048 together.
LENGTHS = [
    *[(42, 285), (19, 82), (63, 482), (120, 164), (345, 205), (17, 195), (18, 9), (9, 322)],
    *[(55, 744), (11, 214), (9, 153), (55, 551), (4, 769), (13, 41), (20, 126), (396, 245)],
    *[(78, 2), (1274, 40), (1301, 276), (1448, 50), (1290, 356), (21, 306), (257, 292)],
    *[(16, 846), (26, 136), (20, 246), (39, 780), (11, 369), (19, 160), (27, 660), (12, 201)],
    *[(443, 365), (148, 181), (197, 89), (10, 483), (12, 83), (17, 227), (46, 119), (26, 27)],
    *[(34, 50), (370, 231), (17, 722), (474, 412), (156, 82), (5, 320), (16, 143), (47, 296)],
    (24, 15),
]
TOKENS = sum(prompt + answer for prompt, answer in LENGTHS)


def with_torch_products() -> ops.OperationSet:
    """The native set with matrix products, tables and sampling in torch."""
    torchs = {"linear", "embedding", "gather_rows", "moe_route", "moe_experts", "sample"}
    return ops.OperationSet(
        name="torch products",
        functions={name: (ops.REFERENCE if name in torchs else ops.CPU)[name] for name in ops.CPU},
        invariant=frozenset(),
        pack=ops.REFERENCE.pack,
        scratch={},
    )


@pytest.mark.skipif(not native_status().available, reason="needs the native kernels")
def test_sharegpt_lengths_on_a_300m_model(
    benchmark: object, llama_300m_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_tokens": 32768,
        "max_num_seqs": 64,
    }
    engines = {
        "native": LLM(str(llama_300m_dir), **options),
        "deterministic": LLM(str(llama_300m_dir), deterministic=True, **options),
    }
    with monkeypatch.context() as patch:
        patch.setattr(ops, "CPU", with_torch_products())
        engines["torch products"] = LLM(str(llama_300m_dir), **options)
    info = engines["native"].engine.info
    prompts = [
        {"prompt_token_ids": rng.integers(1, info.vocab_size, length).tolist()}
        for length, _ in LENGTHS
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True) for _, answer in LENGTHS
    ]
    # The bound: 2 FLOPs per parameter and token, at the best rate of a matrix product here.
    x, weight = torch.randn(512, 1024).bfloat16(), torch.randn(7168, 1024).bfloat16()
    packed, out = ops.CPU.pack(weight), torch.empty(512, 7168).bfloat16()
    flops_per_second = 0.0
    rates = {}
    for name, llm in engines.items():
        for _ in range(20):
            started = time.perf_counter()
            ops.CPU["linear"](x=x, weight=packed, out=out)
            seconds = time.perf_counter() - started
            flops_per_second = max(flops_per_second, 2 * 512 * 1024 * 7168 / seconds)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        rates[name] = TOKENS / (time.perf_counter() - started)
    bound = flops_per_second / (2 * info.weight_bytes / 2)
    benchmark.pedantic(lambda: None, rounds=1)
    share, ratio = rates["native"] / bound, rates["native"] / rates["torch products"]
    benchmark.extra_info.update(
        {
            **{f"{name} tokens/s": round(rate) for name, rate in rates.items()},
            "threads": num_threads(),
            "of torch products": round(ratio, 2),
            "deterministic, of native": round(rates["deterministic"] / rates["native"], 2),
            "of the compute bound": round(share, 3),
            "at least": "1.5 and 0.15",
        }
    )
    assert ratio >= 1.5
    assert share >= 0.15
