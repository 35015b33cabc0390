"""Ctrl-C ends a call of generate at any moment, and the next call works."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from nf_runtime import LLM, SamplingParams

PROMPTS = [{"prompt_token_ids": [i + 1] * 20} for i in range(4)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Any) -> LLM:
    path = tiny_checkpoint("llama3")
    return LLM(str(path), skip_tokenizer_init=True, dtype="float32", enable_prefix_caching=False)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def interrupting(method: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """The method, with Ctrl-C pressed before or after its third call."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and not after:
            signal.raise_signal(signal.SIGINT)
        result = method(*args)
        if calls == 3 and after:
            signal.raise_signal(signal.SIGINT)
        return result

    return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["schedule", "launch", "poll", "commit"])
def test_an_interrupt_leaves_a_clean_engine(
    llm: LLM, place: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(llm)
    engine = llm.engine
    owner = engine.scheduler if place in ("schedule", "commit") else engine.executor
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupting(getattr(owner, place), after=after))
        with pytest.raises(KeyboardInterrupt):
            tokens(llm)
    assert not engine.has_work
    assert not engine.scheduler.has_work
    engine.scheduler.check_integrity()
    engine.kv_cache.check_integrity()
    assert engine.kv_cache.stats().pages_used == 0
    assert tokens(llm) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
