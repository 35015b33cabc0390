"""Log-probabilities, bias and penalties against a straightforward computation on transformers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nf_runtime import LLM, Logprob, RequestOutput, SamplingParams

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE = 200
PROMPT = np.random.default_rng(7).integers(0, VOCAB_SIZE, 40).tolist()
LENGTH = 24


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: MakeCheckpoint) -> Path:
    return tiny_checkpoint("llama3")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    """With chunks that end within a prompt."""
    path = str(checkpoint)
    return LLM(path, skip_tokenizer_init=True, kv_cache_tokens=1024, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Callable[[list[int]], torch.Tensor]:
    """Logits, float32 [n, V], of n tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        result: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
        return result

    return logits


Oracle = Callable[[list[int]], torch.Tensor]


def generate(llm: LLM, prompt: list[int] = PROMPT, **fields: Any) -> RequestOutput:
    params = SamplingParams(**({"temperature": 0, "max_tokens": LENGTH} | fields))
    return llm.generate({"prompt_token_ids": prompt}, params)[0]


def assert_row(row: dict[int, Logprob], token: int, expected: torch.Tensor, count: int) -> None:
    """The token first with its rank, then the most likely ones, all with their log-probability."""
    assert next(iter(row)) == token
    order = expected.argsort(descending=True).tolist()
    assert set(row) == {token, *order[:count]}
    for i, logprob in row.items():
        assert logprob.logprob == pytest.approx(expected[i].item(), abs=1e-4)
        assert logprob.rank == order.index(i) + 1
    others = [logprob.rank for i, logprob in row.items() if i != token]
    assert others == sorted(others)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_logprobs(llm: LLM, oracle: Oracle, count: int, temperature: float) -> None:
    """Those of the model itself, whatever the sampling makes of them."""
    fields: dict[str, Any] = {"logprobs": count, "temperature": temperature, "seed": 3, "top_k": 50}
    (answer,) = generate(llm, **fields, logit_bias={7: 50}, presence_penalty=1.0).outputs
    expected = oracle(PROMPT + answer.token_ids).log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == LENGTH
    for row, token, logprobs in zip(answer.logprobs, answer.token_ids, expected, strict=True):
        assert_row(row, token, logprobs, count)
    chosen = sum(row[t].logprob for row, t in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(chosen)


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 40])
@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs(llm: LLM, oracle: Oracle, length: int, count: int) -> None:
    """In several chunks, and when the prompt's pages are cached already."""
    prompt = PROMPT[:length]
    expected = oracle(prompt).log_softmax(-1)
    for _ in range(2):
        output = generate(llm, prompt, prompt_logprobs=count, max_tokens=3)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == length
        assert output.prompt_logprobs[0] is None
        for i in range(1, length):
            row = output.prompt_logprobs[i]
            assert row is not None
            assert_row(row, prompt[i], expected[i - 1], count)


def test_logprobs_of_a_whole_batch(llm: LLM, oracle: Oracle) -> None:
    """Only some of the requests want them, each its own."""
    wishes = [(None, None), (3, None), (None, 2), (1, 1), (None, None), (0, 0)]
    prompts = [PROMPT[i : i + 20] for i in range(len(wishes))]
    params = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=a, prompt_logprobs=b)
        for a, b in wishes
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    for output, (count, prompt_count) in zip(outputs, wishes, strict=True):
        (answer,) = output.outputs
        logprobs = oracle(output.prompt_token_ids + answer.token_ids).log_softmax(-1)
        assert (answer.logprobs is None) == (count is None)
        assert (output.prompt_logprobs is None) == (prompt_count is None)
        for i, row in enumerate(answer.logprobs or []):
            assert_row(row, answer.token_ids[i], logprobs[19 + i], count or 0)
        for i, prompt_row in enumerate(output.prompt_logprobs or []):
            if prompt_row is not None:
                token = output.prompt_token_ids[i]
                assert_row(prompt_row, token, logprobs[i - 1], prompt_count or 0)


def test_a_bias_forces_a_token(llm: LLM) -> None:
    assert generate(llm, logit_bias={11: 100}).outputs[0].token_ids == [11] * LENGTH


def test_a_bias_forbids_a_token(llm: LLM) -> None:
    plain = generate(llm).outputs[0].token_ids
    forbidden = set(plain)
    for _ in range(3):  # each time, other tokens take their place
        bias = dict.fromkeys(forbidden, -100)
        tokens = generate(llm, logit_bias=bias).outputs[0].token_ids
        assert not forbidden & set(tokens)
        forbidden |= set(tokens)


def test_a_small_bias_is_added(llm: LLM, oracle: Oracle) -> None:
    """A token overtakes the most likely one where the bias bridges the gap, and only there."""
    first, second = oracle(PROMPT)[-1].topk(2).indices.tolist()
    gap = float(oracle(PROMPT)[-1][first] - oracle(PROMPT)[-1][second])
    for factor, expected in ((0.9, first), (1.1, second)):
        output = generate(llm, logit_bias={second: gap * factor}, max_tokens=1)
        assert output.outputs[0].token_ids == [expected]


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"presence_penalty": 2.0, "logit_bias": {3: 4.0, 4: 4.0}},
    ],
    ids=str,
)
def test_penalties(llm: LLM, oracle: Oracle, fields: dict[str, Any]) -> None:
    """Repetition looks at prompt and answer; presence and frequency at the answer alone."""
    repetition = fields.get("repetition_penalty", 1.0)
    answer: list[int] = []
    while len(answer) < LENGTH:
        logits = oracle(PROMPT + answer)[-1].tolist()
        for token in {*PROMPT, *answer}:
            logits[token] *= repetition if logits[token] < 0 else 1 / repetition
        for token, count in Counter(answer).items():
            logits[token] -= fields.get("presence_penalty", 0.0)
            logits[token] -= fields.get("frequency_penalty", 0.0) * count
        for token, bias in fields.get("logit_bias", {}).items():
            logits[token] += bias
        answer.append(int(np.argmax(logits)))
    assert generate(llm, **fields).outputs[0].token_ids == answer
    assert generate(llm).outputs[0].token_ids != answer  # it makes a difference


def test_penalties_belong_to_one_request(llm: LLM) -> None:
    penalized = SamplingParams(temperature=0, max_tokens=LENGTH, repetition_penalty=1.5)
    plain = SamplingParams(temperature=0, max_tokens=LENGTH)
    alone = [generate(llm, repetition_penalty=1.5), generate(llm)]
    mixed = [penalized, plain] * 3
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 6, mixed)
    for i, output in enumerate(outputs):
        assert output.outputs[0].token_ids == alone[i % 2].outputs[0].token_ids
