"""Running ahead changes no token, no count and no end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from nf_runtime import LLM, RequestOutput, SamplingParams
from nf_scheduler import Request, Scheduler

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE, CONTEXT = 200, 256
DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"


def load(path: Path, **options: Any) -> LLM:
    return LLM(
        str(path),
        skip_tokenizer_init=True,
        **{"dtype": "float32", "max_num_seqs": 8, "kv_cache_tokens": 2048} | options,
    )


def generate(llm: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def answers(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


PROMPTS = [
    np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist()
    for length in (1, 15, 16, 17, 40, 7, 33, 64)
]


def test_tokens_do_not_depend_on_how_iterations_are_formed(
    tiny_checkpoint: MakeCheckpoint, family: str
) -> None:
    """One request at a time, one iteration at a time, and then everything at once."""
    path = tiny_checkpoint(family)
    params = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, max_tokens=30, repetition_penalty=1.2, n=2),
    ]
    mixed = [params[i % 2] for i in range(len(PROMPTS))]
    plain = load(path, async_scheduling=False, max_num_seqs=1, enable_prefix_caching=False)
    expected = [answers(generate(plain, [p], q))[0] for p, q in zip(PROMPTS, mixed, strict=True)]
    assert plain.engine.stats.iterations_ahead == 0
    plain.shutdown()
    for lag, chunk, tokens, policy in (
        (False, 5, 160, "fcfs"),
        (True, 5, 160, "shortest"),
        (True, None, 2048, "prefix"),
        (True, 16, 160, "fcfs"),
    ):
        llm = load(
            path,
            async_scheduling=lag,
            max_prefill_chunk=chunk,
            kv_cache_tokens=tokens,
            max_model_len=128,
            max_num_batched_tokens=48,
            policy=policy,
            admission="greedy",
        )
        outputs = generate(llm, PROMPTS, mixed)
        assert answers(outputs) == expected, (lag, chunk, tokens, policy)
        stats = llm.engine.stats
        assert (stats.iterations_ahead > 20) == lag
        assert (stats.preemptions > 0) == (tokens == 160)
        ledgers = [answer.ledger for output in outputs for answer in output.outputs]
        chunks = [ledger.prefill_chunks for ledger in ledgers if ledger is not None]
        assert (max(chunks) > 6) == (chunk == 5)
        llm.engine.scheduler.check_integrity()
        llm.engine.kv_cache.check_integrity()
        llm.shutdown()


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(request: pytest.FixtureRequest, tiny_checkpoint: MakeCheckpoint) -> LLM:
    return load(
        tiny_checkpoint("llama3", max_position_embeddings=CONTEXT), async_scheduling=request.param
    )


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: MakeCheckpoint) -> Callable[[int], list[int]]:
    """What transformers generates after the fifth prompt."""
    path = tiny_checkpoint("llama3", max_position_embeddings=CONTEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()

    def generate(count: int) -> list[int]:
        import torch

        ids = torch.tensor([PROMPTS[4]])
        out = model.generate(ids, max_new_tokens=count, do_sample=False, use_cache=True)
        return out[0, len(PROMPTS[4]) :].tolist()

    return generate


def check(llm: LLM, params: SamplingParams, expected: list[int], reason: str, stop: Any) -> None:
    """One request alone, and beside others that go on."""
    for others in (0, 3):
        long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        prompts, wanted = [PROMPTS[4], *PROMPTS[:others]], [params, *[long] * others]
        output = generate(llm, prompts, wanted)[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == (expected, reason)
        assert output.stop_reason == stop
        assert output.ledger is not None
        assert output.ledger.output_tokens == len(expected)
        assert output.ledger.prompt_tokens == len(PROMPTS[4])
        assert llm.engine.kv_cache.stats().pages_used == 0
        assert not llm.engine.has_work


def distinct(tokens: list[int], at: int) -> int:
    """The first position from `at` on whose token has not come before."""
    return next(i for i in range(at, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 23])
def test_a_stop_id_ends_a_request_where_it_comes(llm: LLM, reference: Any, at: int) -> None:
    tokens = reference(60)
    at = distinct(tokens, at)
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=[tokens[at]]
    )
    check(llm, params, tokens[: at + 1], "stop", tokens[at])


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 23])
def test_the_end_of_sequence_ends_a_request(
    tiny_checkpoint: MakeCheckpoint, llm: LLM, reference: Any, at: int, monkeypatch: Any
) -> None:
    import dataclasses

    tokens = reference(60)
    at = distinct(tokens, at)
    info = dataclasses.replace(llm.engine.info, eos_token_ids=(tokens[at],))
    monkeypatch.setattr(llm.engine, "info", info)
    params = SamplingParams(temperature=0, max_tokens=60)
    expected = tokens[: at + 1]
    output = generate(llm, [PROMPTS[4]], params)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (expected, "stop")
    assert output.ledger is not None
    assert output.ledger.output_tokens == at + 1


@pytest.mark.parametrize("count", [1, 2, 8, 9, 24, 25])
def test_max_tokens(llm: LLM, reference: Any, count: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    check(llm, params, reference(count), "length", None)


@pytest.mark.parametrize("at", [1, 8, 23])
def test_a_stop_id_and_max_tokens_at_the_same_token(llm: LLM, reference: Any, at: int) -> None:
    tokens = reference(60)
    at = distinct(tokens, at)
    params = SamplingParams(
        temperature=0, max_tokens=at + 1, ignore_eos=True, stop_token_ids=[tokens[at]]
    )
    check(llm, params, tokens[: at + 1], "stop", tokens[at])


@pytest.mark.parametrize("least", [1, 2, 9])
def test_min_tokens_holds_stop_ids_back(llm: LLM, least: int) -> None:
    """Every token is a stop id but one, so the request ends as soon as it may."""
    stops = list(range(1, VOCAB_SIZE))
    params = SamplingParams(
        temperature=0, max_tokens=30, min_tokens=least, ignore_eos=True, stop_token_ids=stops
    )
    output = generate(llm, [PROMPTS[4]], params)[0].outputs[0]
    *held, last = output.token_ids
    assert held[:least] == [0] * least
    assert set(held) == {0}
    assert last != 0
    assert (output.finish_reason, output.stop_reason) == ("stop", last)
    assert output.ledger is not None
    assert output.ledger.output_tokens == len(output.token_ids)


@pytest.mark.parametrize("room", [1, 2, 10])
def test_the_end_of_the_context(llm: LLM, room: int) -> None:
    """Whether that is what was asked for, more than there is, or nothing was."""
    prompt = np.random.default_rng(9).integers(0, VOCAB_SIZE, CONTEXT - room).tolist()
    limits = (room, None, room + 1)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits]
    outputs = [output.outputs[0] for output in generate(llm, [prompt] * 3, params)]
    assert [(len(o.token_ids), o.finish_reason) for o in outputs] == [(room, "length")] * 3
    assert outputs[0].token_ids == outputs[1].token_ids == outputs[2].token_ids
    assert [o.ledger and o.ledger.output_tokens for o in outputs] == [room] * 3


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def talker(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A model whose answers are text, so that a stop string can end them."""
    llm = LLM(str(DEMO), dtype="float32", kv_cache_tokens=2048, async_scheduling=request.param)
    yield llm
    assert (llm.engine.stats.iterations_ahead > 0) == request.param
    llm.shutdown()


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("limit", ["none", "its end", "one before", "one after"])
def test_a_stop_string_ends_a_request_where_it_comes(
    talker: LLM, num_tokens: int, limit: str
) -> None:
    """It is found outside of the engine, which has gone on by then: nothing of that is kept."""
    assert talker.tokenizer is not None
    prompt = talker.tokenizer.encode("def fibonacci(n):")
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    (whole,) = generate(talker, [prompt], SamplingParams(max_tokens=30, **greedy))[0].outputs
    texts = [talker.tokenizer.decode(whole.token_ids[:i]) for i in range(31)]
    end = next(
        i for i in range(6, 30) if texts[i][len(texts[i - num_tokens]) :] not in texts[i - 1]
    )
    stop = texts[end][len(texts[end - num_tokens]) :]
    assert texts[end].index(stop) == len(texts[end - num_tokens])
    most = {"none": 30, "its end": end, "one before": end - 1, "one after": end + 1}[limit]
    params = SamplingParams(max_tokens=most, stop=["\x01", stop], **greedy)
    expected = (texts[end - num_tokens], whole.token_ids[:end], "stop", stop)
    if limit == "one before":
        expected = (texts[end - 1], whole.token_ids[: end - 1], "length", None)
    for others in (0, 3):
        long = SamplingParams(max_tokens=60, **greedy)
        prompts, wanted = [prompt, *PROMPTS[:others]], [params, *[long] * others]
        got = generate(talker, prompts, wanted)[0].outputs[0]
        assert (got.text, got.token_ids, got.finish_reason, got.stop_reason) == expected
        assert got.ledger is not None
        assert got.ledger.output_tokens == len(got.token_ids)
        assert talker.engine.kv_cache.stats().pages_used == 0
        talker.engine.scheduler.check_integrity()


def test_what_was_computed_ahead_is_dropped_and_freed_once(
    tiny_checkpoint: MakeCheckpoint, reference: Any
) -> None:
    """A request that stops has one more token in flight; nobody ever sees it."""
    llm = load(tiny_checkpoint("llama3", max_position_embeddings=CONTEXT))
    tokens = reference(60)
    at = distinct(tokens, 8)
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=[tokens[at]]
    )
    before = llm.engine.stats
    output = generate(llm, [PROMPTS[4]], params)[0].outputs[0]
    after = llm.engine.stats
    assert len(output.token_ids) == at + 1
    assert after.iterations - before.iterations == at + 2
    assert after.iterations_ahead - before.iterations_ahead == at + 1
    llm.engine.kv_cache.check_integrity()


def test_answers_to_one_prompt_share_its_kv(llm: LLM) -> None:
    prompt = np.random.default_rng(11).integers(0, VOCAB_SIZE, 50).tolist()
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=12, ignore_eos=True)
    before = llm.engine.stats.iteration_tokens
    (output,) = generate(llm, [prompt], params)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    ledgers = [answer.ledger for answer in output.outputs]
    assert [ledger and ledger.cached_tokens for ledger in ledgers] == [0, 49, 49, 49]
    # The prompt once, its last token for each other answer, and the decodes of all but the last.
    assert llm.engine.stats.iteration_tokens - before == 50 + 3 + 4 * 11


def test_a_failing_iteration_ends_those_that_were_started_after_it(
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    llm = load(tiny_checkpoint("llama3"))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = answers(generate(llm, PROMPTS[:3], params))
    calls = 0

    def fail(layer: int, edges: object) -> None:
        nonlocal calls
        calls += layer == 0
        if calls == 6:
            raise RuntimeError("the device is on fire")

    llm.engine.executor.before_layer.append(fail)
    with pytest.raises(RuntimeError, match="on fire"):
        generate(llm, PROMPTS[:3], params)
    llm.engine.executor.before_layer.clear()
    assert not llm.engine.has_work
    assert llm.engine.kv_cache.stats().pages_used == 0
    llm.engine.scheduler.check_integrity()
    llm.engine.kv_cache.check_integrity()
    assert answers(generate(llm, PROMPTS[:3], params)) == expected


def test_a_name_can_be_used_again_as_soon_as_its_request_has_ended(
    tiny_checkpoint: MakeCheckpoint, reference: Any
) -> None:
    from nf_runtime.engine_types import EngineRequest

    llm = load(tiny_checkpoint("llama3", max_position_embeddings=CONTEXT))
    engine = llm.engine
    tokens = reference(60)
    at = distinct(tokens, 3)
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=[tokens[at]]
    )
    for _ in range(3):
        engine.add(EngineRequest("a", PROMPTS[4], params, seed=0))
        received: list[int] = []
        while len(received) <= at:
            received += [output.token_id for output in engine.step() if output.token_id is not None]
        assert received == tokens[: at + 1]
        assert engine.scheduler.is_in_flight("a")
    while engine.has_work:
        engine.step()


def test_scheduler_and_loop_agree_on_what_is_in_flight(tiny_checkpoint: MakeCheckpoint) -> None:
    llm = load(tiny_checkpoint("llama3"))
    scheduler: Scheduler = llm.engine.scheduler
    scheduler.add(Request("x", np.array([1, 2, 3]), 2))
    scheduler.abort("x")
    assert not scheduler.in_flight
    assert llm.engine.loop.num_in_flight == 0
