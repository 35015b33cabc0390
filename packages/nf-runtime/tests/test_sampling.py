"""Tokens are drawn from the right distribution, and a seed gives the same ones in any company."""

import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from nf_runtime import LLM, SamplingParams
from nf_runtime.sampler import uniform
from nf_runtime.seeds import choice_seeds

DRAWS = 4096
PROMPT = [7, 3, 11]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: object) -> LLM:
    # Small weights make a flat distribution, in which every token is drawn now and then.
    path = tiny_checkpoint("llama3", vocab_size=40, initializer_range=0.05)
    return LLM(str(path), skip_tokenizer_init=True, dtype="float32")


@pytest.fixture(scope="module")
def exact_logits(tiny_checkpoint: object) -> np.ndarray:
    path = tiny_checkpoint("llama3", vocab_size=40, initializer_range=0.05)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1].double().numpy()


def exact_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The filters one after the other, written for one row and without haste."""
    scaled = logits / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities, kind="stable")
    kept = probabilities[order]
    if params.top_k > 0:
        kept[params.top_k :] = 0
    kept /= kept.sum()
    if params.top_p < 1:
        before = np.cumsum(kept) - kept
        kept[before >= params.top_p] = 0
        kept /= kept.sum()
    kept[kept < params.min_p * kept[0]] = 0
    result = np.zeros_like(kept)
    result[order] = kept / kept.sum()
    return result


def draw(llm: LLM, count: int, **fields: object) -> np.ndarray:
    params = [SamplingParams(max_tokens=1, seed=i, **fields) for i in range(count)]
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * count, params)
    return np.array([output.outputs[0].token_ids[0] for output in outputs])


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_distribution(llm: LLM, exact_logits: np.ndarray, fields: dict[str, float]) -> None:
    expected = exact_distribution(exact_logits, SamplingParams(**fields))
    drawn = np.bincount(draw(llm, DRAWS, **fields), minlength=len(expected))
    allowed = expected > 0
    assert drawn[~allowed].sum() == 0
    assert allowed.sum() > 2
    test = scipy.stats.chisquare(drawn[allowed], expected[allowed] * DRAWS)
    assert test.pvalue > 1e-4, (test, drawn, expected * DRAWS)


def test_the_wrong_distribution_is_noticed(llm: LLM, exact_logits: np.ndarray) -> None:
    """Negative control: the chi-square test tells temperature 0.5 from 1, with any weights.

    Not 1 from 2: weights can be so flat that this takes more draws.
    """
    expected = exact_distribution(exact_logits, SamplingParams(temperature=1.0))
    drawn = np.bincount(draw(llm, DRAWS, temperature=0.5), minlength=len(expected))
    assert scipy.stats.chisquare(drawn, expected * DRAWS).pvalue < 1e-4


def test_a_seed_gives_the_same_tokens_in_any_company(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1234, max_tokens=30, ignore_eos=True)
    prompt = {"prompt_token_ids": PROMPT}
    alone = llm.generate(prompt, params)[0].outputs[0].token_ids
    others = [
        SamplingParams(temperature=0.1 + i / 10, top_k=i, max_tokens=5 + 3 * i, ignore_eos=True)
        for i in range(12)
    ]
    for position in (0, 6, 12):
        company: list[SamplingParams] = [*others]
        company.insert(position, params)
        prompts = [{"prompt_token_ids": [i + 1] * (5 * i + 1)} for i in range(13)]
        prompts[position] = prompt
        assert llm.generate(prompts, company)[position].outputs[0].token_ids == alone


def test_another_seed_gives_other_tokens(llm: LLM) -> None:
    prompt = {"prompt_token_ids": PROMPT}
    answers = {
        tuple(
            llm.generate(prompt, SamplingParams(seed=seed, max_tokens=20, ignore_eos=True))[0]
            .outputs[0]
            .token_ids
        )
        for seed in range(8)
    }
    assert len(answers) == 8


def test_answers_of_one_request_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=5, max_tokens=20, ignore_eos=True)
    outputs = llm.generate({"prompt_token_ids": PROMPT}, params)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 4


def test_requests_without_a_seed_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 4, params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    seeds = np.array(
        [choice_seeds(SamplingParams(seed=i), 0, 0)[0] for i in range(2000)], dtype=np.uint64
    )
    by_seed = uniform(seeds, np.full(2000, 17))
    by_position = uniform(np.full(2000, seeds[0]), np.arange(2000))
    for numbers in (by_seed, by_position):
        assert numbers.dtype == np.float32
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    largest = uniform(np.arange(2**20, dtype=np.uint64), np.zeros(2**20, dtype=np.int64)).max()
    assert 0.9999 < largest < 1.0
