"""Every family gives the tokens and logits of transformers, which is asked at test time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nf_runtime import LLM, SamplingParams

MakeCheckpoint = Callable[..., Path]

# One token, page boundaries (page_size 16), several pages, and one that needs several chunks.
LENGTHS = (1, 3, 16, 17, 31, 60, 5, 33)
NEW_TOKENS = 40  # crosses two page boundaries at least


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 200, n).tolist() for n in lengths]


def load_oracle(path: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def oracle_tokens(path: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    model = load_oracle(path)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def our_tokens(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [output.outputs[0].token_ids for output in outputs]


def load(path: Path, **options: object) -> LLM:
    defaults = {"dtype": "float32", "max_num_batched_tokens": 24, "max_num_seqs": 8}
    return LLM(str(path), skip_tokenizer_init=True, **(defaults | options))


@pytest.fixture(scope="module")
def expected(family: str, tiny_checkpoint: MakeCheckpoint) -> list[list[int]]:
    """What transformers answers to prompts of all lengths, with a model that says things."""
    answers = oracle_tokens(tiny_checkpoint(family), prompts_of(LENGTHS), NEW_TOKENS)
    assert len({token for tokens in answers for token in tokens}) > 20
    return answers


@pytest.mark.parametrize("native_kernels", [True, False], ids=["native", "plain"])
def test_greedy_tokens_equal_transformers(
    family: str,
    tiny_checkpoint: MakeCheckpoint,
    expected: list[list[int]],
    native_kernels: bool,
) -> None:
    """Eight mixed lengths in one batch, the longest in three chunks, then each one alone."""
    prompts = prompts_of(LENGTHS)
    llm = load(tiny_checkpoint(family), native_kernels=native_kernels)
    assert our_tokens(llm, prompts, NEW_TOKENS) == expected
    for prompt, tokens in zip(prompts[3:6], expected[3:6], strict=True):
        assert our_tokens(llm, [prompt], NEW_TOKENS) == [tokens]


@pytest.mark.parametrize("head_dim", [24, 64, 80, 128])
@pytest.mark.parametrize("base", ["llama3", "mistral", "qwen2", "qwen3", "mixtral", "qwen3-moe"])
def test_head_sizes(base: str, head_dim: int, tiny_checkpoint: MakeCheckpoint) -> None:
    # Qwen2 knows no head_dim: its heads share the hidden size evenly.
    hidden = {"hidden_size": head_dim * 4} if base == "qwen2" else {}
    path = tiny_checkpoint(base, head_dim=head_dim, num_hidden_layers=2, **hidden)
    prompts = prompts_of((1, 17, 40), seed=1)
    expected = oracle_tokens(path, prompts, 12)
    assert our_tokens(load(path), prompts, 12) == expected


def test_bf16_logits_are_as_close_as_those_of_transformers(
    family: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    """Teacher-forced over 192 tokens, against transformers in float32."""
    # Smaller weights than elsewhere: with large ones a tiny model is chaotic, and rounding errors
    # say little about who computes better.
    path = tiny_checkpoint(family, initializer_range=0.05, num_hidden_layers=4)
    prompt = prompts_of((192,), seed=2)[0]
    with torch.inference_mode():
        exact = load_oracle(path)(torch.tensor([prompt])).logits[0, :-1]
        theirs = load_oracle(path, torch.bfloat16)(torch.tensor([prompt])).logits[0, :-1].float()
    ours = prompt_logits(load(path, dtype="bfloat16"), prompt)
    our_distance = (ours - exact).square().mean().sqrt().item()
    their_distance = (theirs - exact).square().mean().sqrt().item()
    assert 0 < our_distance <= 1.25 * their_distance, (our_distance, their_distance)


def prompt_logits(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Logits of every prompt position but the last, as the engine computes them, chunk by chunk."""
    chunks: list[torch.Tensor] = []
    sampler = llm.engine.executor.sampler
    original = sampler.prompt_logprobs

    def record(plan: Any, logits: torch.Tensor, stream: Any) -> Any:
        stream.call(lambda: chunks.append(logits.float().clone()))
        return original(plan, logits, stream)

    sampler.prompt_logprobs = record
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    llm.generate({"prompt_token_ids": prompt}, params)
    return torch.cat(chunks)
