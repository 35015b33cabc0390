"""Hooks see every layer of every iteration, in order, with the batch's activations."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from nf_runtime import LLM, SamplingParams

MakeCheckpoint = Callable[..., Path]
LAYERS, HIDDEN, VOCAB_SIZE = 3, 64, 200
PROMPT = np.random.default_rng(0).integers(0, VOCAB_SIZE, 20).tolist()


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: MakeCheckpoint) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), skip_tokenizer_init=True, kv_cache_tokens=512) as llm:
        yield llm


def generate(llm: LLM, count: int = 4) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count)
    return llm.generate({"prompt_token_ids": PROMPT}, params)[0].outputs[0].token_ids


def test_hooks_run_in_order(llm: LLM) -> None:
    calls: list[tuple[str, int, int]] = []
    executor = llm.engine.executor

    def note(name: str) -> Callable[[int, Mapping[str, Tensor]], None]:
        return lambda layer, edges: calls.append((name, layer, len(edges["hidden"])))

    executor.before_layer += [note("first"), note("second")]
    executor.after_layer.append(note("after"))
    generate(llm, 3)
    assert calls == [
        (name, layer, rows)
        for rows in (20, 1, 1)  # the prompt, then two decodes; the last token is not computed on
        for layer in range(LAYERS)
        for name in ("first", "second", "after")
    ]
    calls.clear()
    executor.before_layer.clear()
    executor.after_layer.clear()
    generate(llm, 3)
    assert calls == []


def test_hooks_see_the_activations(llm: LLM, checkpoint: Path) -> None:
    """The hidden states before and after every layer are those of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    seen: dict[tuple[str, int], Tensor] = {}
    executor = llm.engine.executor
    executor.before_layer.append(lambda i, edges: seen.update({("in", i): edges["hidden"].clone()}))
    executor.after_layer.append(lambda i, edges: seen.update({("out", i): edges["hidden"].clone()}))
    generate(llm, 1)
    for layer in range(LAYERS):
        torch.testing.assert_close(seen["in", layer], expected[layer][0], atol=1e-4, rtol=1e-4)
        if layer + 1 < LAYERS:  # transformers gives the last one after the final norm
            torch.testing.assert_close(seen["out", layer], seen["in", layer + 1])


def test_hooks_get_every_edge(llm: LLM) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    llm.engine.executor.after_layer.append(
        lambda layer, edges: shapes.update({k: tuple(v.shape) for k, v in edges.items()})
    )
    generate(llm, 1)
    assert shapes["hidden"] == shapes["normed"] == (20, HIDDEN)
    assert shapes["qkv"] == (20, 128)
    assert shapes["gate_up"] == (20, 192)
    assert shapes["logits"] == (1, VOCAB_SIZE)  # of the row that is sampled alone


def test_a_hook_can_change_what_comes_out(llm: LLM) -> None:
    plain = generate(llm)

    def negate(layer: int, edges: Mapping[str, Tensor]) -> None:
        edges["hidden"].neg_()

    llm.engine.executor.after_layer.append(negate)
    assert generate(llm) != plain


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_plain_operations_give_the_same_tokens(
    tiny_checkpoint: MakeCheckpoint, family: str
) -> None:
    path = str(tiny_checkpoint(family))
    prompts = [{"prompt_token_ids": PROMPT[:n]} for n in (1, 7, 16, 20)]
    params = SamplingParams(temperature=0, max_tokens=24)
    answers = []
    for native in (True, False):
        llm = LLM(path, skip_tokenizer_init=True, kv_cache_tokens=512, native_kernels=native)
        answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert answers[0] == answers[1]


def test_poll_without_launch(llm: LLM) -> None:
    with pytest.raises(RuntimeError, match="poll was called without a launch"):
        llm.engine.executor.poll()
