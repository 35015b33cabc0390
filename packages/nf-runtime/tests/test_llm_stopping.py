"""Where an answer ends: stop strings, stop tokens, end of sequence, and the minimum before them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nf_runtime import LLM, SamplingParams
from nf_runtime.outputs import CompletionOutput

MakeCheckpoint = Callable[..., Path]
DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
VOCAB_SIZE = json.loads((DEMO / "config.json").read_text())["vocab_size"]
PROMPT = "import os\n"
LENGTH = 30


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: MakeCheckpoint) -> Path:
    """A random model with the demo model's vocabulary, and no end-of-sequence token."""
    return tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), tokenizer=str(DEMO), kv_cache_tokens=1024)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    shared.engine.scheduler.check_integrity()
    shared.engine.kv_cache.check_integrity()
    assert shared.engine.stats.kv_pages_used == 0


def answer(llm: LLM, **fields: Any) -> CompletionOutput:
    params = SamplingParams(**({"temperature": 0, "max_tokens": LENGTH} | fields))
    return llm.generate(PROMPT, params)[0].outputs[0]


@pytest.fixture(scope="module")
def plain(shared: LLM) -> CompletionOutput:
    """The answer that nothing stops."""
    return answer(shared)


def pieces(llm: LLM, tokens: list[int]) -> list[str]:
    assert llm.tokenizer is not None
    return [llm.tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]


def words(plain: CompletionOutput, llm: LLM, start: int) -> tuple[int, str]:
    """A token from `start` on, and its text, which is ASCII and new in the answer."""
    assert llm.tokenizer is not None
    for position in range(start, LENGTH):
        text = llm.tokenizer.token_text(plain.token_ids[position])
        before = llm.tokenizer.decode(plain.token_ids[:position])
        if text.isascii() and len(text) > 2 and text not in before + text[:-1]:
            return position, text
    raise AssertionError("the random model says nothing that a stop string can be made of")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string(llm: LLM, plain: CompletionOutput, include: bool) -> None:
    """The part before it within a token is kept, the rest of that token is not."""
    position, text = words(plain, llm, 5)
    stop = text[1:]
    end = plain.text.index(stop)
    stopped = answer(llm, stop=["never said", stop], include_stop_str_in_output=include)
    assert stopped.text == plain.text[: end + len(stop) if include else end]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= position + 1
    assert stopped.ledger is not None


def test_a_stop_string_over_two_tokens(llm: LLM, plain: CompletionOutput) -> None:
    text = plain.text
    whole = pieces(llm, plain.token_ids)
    for i in range(3, LENGTH - 1):
        border = len(whole[i])
        stop = text[border - 1 : border + 1]
        if "\ufffd" not in whole[i] and stop.isascii() and text.index(stop) == border - 1:
            stopped = answer(llm, stop=stop)
            assert stopped.text == text[: border - 1]
            assert stopped.token_ids == plain.token_ids[: i + 2]
            return
    raise AssertionError("no place in the answer is fit for this test")


def test_what_might_have_been_a_stop_string_is_given_in_the_end(
    llm: LLM, plain: CompletionOutput
) -> None:
    stopped = answer(llm, stop=[plain.text[-5:] + "never said", plain.text[-1:] + "nor this"])
    assert stopped.text == plain.text
    assert stopped.finish_reason == "length"
    assert stopped.stop_reason is None


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token(llm: LLM, plain: CompletionOutput, include: bool) -> None:
    """It is part of the tokens; its text only if that was asked for."""
    token = plain.token_ids[7]
    first = plain.token_ids.index(token)
    stopped = answer(llm, stop_token_ids=[token, 5], include_stop_str_in_output=include)
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == token
    kept = plain.token_ids[: first + include]
    assert llm.tokenizer is not None
    assert stopped.text == llm.tokenizer.decode(kept).rstrip("\ufffd")


def test_nothing_stops_before_the_minimum(llm: LLM, plain: CompletionOutput) -> None:
    """A stop token is forbidden before it; a stop string is only looked for after it."""
    token = plain.token_ids[7]
    minimum = plain.token_ids.index(token) + 3
    by_token = answer(llm, stop_token_ids=[token], min_tokens=minimum)
    assert token not in by_token.token_ids[:minimum]
    assert by_token.token_ids[: minimum - 3] == plain.token_ids[: minimum - 3]
    assert len(by_token.token_ids) > minimum

    position, text = words(plain, llm, 2)
    by_string = answer(llm, stop=text, min_tokens=position + 2)
    assert by_string.text.startswith(pieces(llm, plain.token_ids)[position].rstrip("\ufffd"))
    assert len(by_string.token_ids) > position + 2


def with_eos(checkpoint: Path, folder: Path, config: Any, generation: Any) -> LLM:
    path = Path(shutil.copytree(checkpoint, folder / "model"))
    values = json.loads((path / "config.json").read_text()) | {"eos_token_id": config}
    (path / "config.json").write_text(json.dumps(values))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return LLM(str(path), tokenizer=str(DEMO), kv_cache_tokens=1024)


@pytest.mark.parametrize("source", ["config", "generation", "list", "generation list"])
def test_end_of_sequence(
    checkpoint: Path, tmp_path: Path, plain: CompletionOutput, source: str
) -> None:
    token = plain.token_ids[7]
    first = plain.token_ids.index(token)
    value = [5, token] if "list" in source else token
    files = (None, value) if "generation" in source else (value, None)
    llm = with_eos(checkpoint, tmp_path, *files)
    stopped = answer(llm)
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert answer(llm, ignore_eos=True).token_ids == plain.token_ids
    named = answer(llm, ignore_eos=True, stop_token_ids=[token])
    assert (named.token_ids, named.stop_reason) == (stopped.token_ids, token)
    later = answer(llm, min_tokens=first + 2)
    assert token not in later.token_ids[: first + 2]


def test_only_one_of_several_answers_stops(llm: LLM) -> None:
    free = SamplingParams(n=4, seed=1, max_tokens=LENGTH)
    outputs = llm.generate(PROMPT, free)[0].outputs
    token = outputs[2].token_ids[4]
    stopping = SamplingParams(n=4, seed=1, max_tokens=LENGTH, stop_token_ids=[token])
    for before, after in zip(outputs, llm.generate(PROMPT, stopping)[0].outputs, strict=True):
        if token in before.token_ids:
            end = before.token_ids.index(token) + 1
            assert (after.token_ids, after.finish_reason) == (before.token_ids[:end], "stop")
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, "length")
