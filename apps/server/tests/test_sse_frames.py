"""Golden bytes of streams, and bodies that are not streamed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from nf_runtime import ChoiceDelta, Logprob
from nf_server.errors import engine_unavailable
from nf_server.render.chat import ChatAnswer, ChatStream
from nf_server.render.completions import CompletionAnswer, CompletionShape, CompletionStream
from nf_server.render.head import AnswerHead
from nf_server.sse import error_event

CHAT = AnswerHead("chatcmpl-1", "chat.completion.chunk", "demo", 1700000000)
TEXT = AnswerHead("cmpl-1", "text_completion", "demo", 1700000000)
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {
        "cached_tokens": 0,
        "nanoflow_cached_tokens_by_tier": {"device": 0, "host": 0, "disk": 0},
    },
}
SHAPE = CompletionShape(num_choices=1, echo=None, logprobs=False, decode=chr)


def delta(
    text: str = "",
    ids: list[int] | None = None,
    finish: str | None = None,
    *,
    index: int = 0,
    logprobs: list[Any] | None = None,
) -> ChoiceDelta:
    return ChoiceDelta(
        index=index,
        text=text,
        token_ids=ids or [],
        logprobs=logprobs,
        finish_reason=finish,
        stop_reason=None,
    )


def stream(prompt: list[int], prompt_logprobs: list[Any] | None = None) -> Any:
    return SimpleNamespace(prompt_token_ids=prompt, prompt_logprobs=prompt_logprobs)


def payloads(frames: bytes) -> list[Any]:
    parts = frames.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def test_chat_stream_golden_bytes() -> None:
    chat = ChatStream(CHAT, 1)
    frames = [
        chat.start(),
        chat.frames(0, delta('Hi "you"\n', [1])),
        chat.frames(0, delta("é😀", [2])),
        chat.frames(0, delta("", [3], "stop")),
        chat.finish(),
    ]
    head = (
        'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
        '"model":"demo","choices":[{"index":0,"delta":'
    )
    assert frames[0].decode() == (
        head + '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert frames[1].decode() == (
        head + '{"content":"Hi \\"you\\"\\n"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert frames[2].decode() == (
        head + '{"content":"é😀"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert frames[3].decode() == head + '{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    assert frames[4] == b"data: [DONE]\n\n"


def test_completion_stream_golden_bytes() -> None:
    text = CompletionStream(TEXT, [stream([1, 2])], SHAPE)
    head = (
        'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,'
        '"model":"demo","choices":[{"index":0,"text":'
    )
    assert text.start() == b""
    assert text.frames(0, delta(" a", [1])).decode() == (
        head + '" a","logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert text.frames(0, delta("b", [2], "length")).decode() == (
        head + '"b","logprobs":null,"finish_reason":"length"}]}\n\n'
    )
    assert text.finish() == b"data: [DONE]\n\n"


def test_error_event_golden_bytes() -> None:
    frames = error_event(engine_unavailable())
    error, done = payloads(frames)
    assert done == "data: [DONE]"
    assert error == {
        "error": {
            "message": "The engine process has stopped and the server is unavailable until it is "
            "restarted.",
            "type": "server_error",
            "param": None,
            "code": "engine_dead",
        }
    }


def test_nothing_to_show_makes_no_frame() -> None:
    held_back = delta("", [7])
    assert ChatStream(CHAT, 1).frames(0, held_back) == b""
    assert CompletionStream(TEXT, [stream([1])], SHAPE).frames(0, held_back) == b""


def test_usage_comes_in_a_last_chunk_and_is_null_before() -> None:
    for renderer in (
        ChatStream(CHAT, 1, usage=lambda: USAGE),
        CompletionStream(TEXT, [stream([1])], SHAPE, usage=lambda: USAGE),
    ):
        frames = renderer.start() + renderer.frames(0, delta("x", [1]))
        frames += renderer.frames(0, delta("", [2], "stop")) + renderer.finish()
        *chunks, last, done = payloads(frames)
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        assert last["choices"] == []
        assert last["usage"] == USAGE
        assert done == "data: [DONE]"


def test_continuous_usage_is_in_every_chunk() -> None:
    for renderer in (
        ChatStream(CHAT, 1, usage=lambda: USAGE, continuous=True),
        CompletionStream(TEXT, [stream([1])], SHAPE, usage=lambda: USAGE, continuous=True),
    ):
        frames = renderer.start() + renderer.frames(0, delta("x", [1]))
        frames += renderer.frames(0, delta("", [2], "stop")) + renderer.finish()
        assert all(chunk["usage"] == USAGE for chunk in payloads(frames)[:-1])


def test_several_choices_have_their_index() -> None:
    chat = ChatStream(CHAT, 3)
    assert [c["choices"][0]["index"] for c in payloads(chat.start())] == [0, 1, 2]
    (chunk,) = payloads(chat.frames(2, delta("x", [1], index=2)))
    assert chunk["choices"][0]["index"] == 2


SAMPLED = {5: Logprob(-0.5, 2, "b"), 4: Logprob(-0.25, 1, "aé")}
CHAT_LOGPROBS = {
    "content": [
        {
            "token": "b",
            "logprob": -0.5,
            "bytes": [98],
            "top_logprobs": [
                {"token": "aé", "logprob": -0.25, "bytes": [97, 195, 169]},
                {"token": "b", "logprob": -0.5, "bytes": [98]},
            ],
        }
    ],
    "refusal": None,
}


def test_chat_logprobs_streamed_and_not() -> None:
    chat = ChatStream(CHAT, 1, top_logprobs=2)
    (chunk,) = payloads(chat.frames(0, delta("", [5], logprobs=[SAMPLED])))
    assert chunk["choices"][0] == {
        "index": 0,
        "delta": {"content": ""},
        "logprobs": CHAT_LOGPROBS,
        "finish_reason": None,
    }
    answer = ChatAnswer(CHAT, [stream([1])], 1, top_logprobs=2)
    answer.add(0, delta("b", [5], "stop", logprobs=[SAMPLED]))
    assert answer.body(USAGE)["choices"][0]["logprobs"] == CHAT_LOGPROBS


def test_minus_infinity_is_a_number_in_json() -> None:
    entry = {1: Logprob(float("-inf"), 1, "x")}
    chat = ChatStream(CHAT, 1, top_logprobs=0)
    (chunk,) = payloads(chat.frames(0, delta("x", [1], logprobs=[entry])))
    assert chunk["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_completion_logprobs_and_echo() -> None:
    prompt = stream([72, 105], [None, {105: Logprob(-1.0, 1, "i")}])
    shape = CompletionShape(num_choices=1, echo=["Hi"], logprobs=True, decode=chr)
    answer = CompletionAnswer(TEXT, [prompt], shape)
    answer.add(0, delta("b", [5], "length", logprobs=[SAMPLED]))
    expected = {
        "tokens": ["H", "i", "b"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"i": -1.0}, {"b": -0.5, "aé": -0.25}],
        "text_offset": [0, 1, 2],
    }
    choice = answer.body(USAGE)["choices"][0]
    assert choice["text"] == "Hib"
    assert choice["logprobs"] == expected

    renderer = CompletionStream(TEXT, [prompt], shape)
    chunks = payloads(renderer.frames(0, delta("b", [5], "length", logprobs=[SAMPLED])))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi", "b"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    joined = {name: streamed[0][name] + streamed[1][name] for name in expected}
    assert joined == expected


def test_completion_choices_are_numbered_over_prompts() -> None:
    shape = CompletionShape(num_choices=2, echo=["A", "B"], logprobs=False, decode=chr)
    answer = CompletionAnswer(TEXT, [stream([1]), stream([2])], shape)
    for choice in range(4):
        answer.add(choice, delta(str(choice), [1], "stop"))
    body = answer.body(USAGE)
    assert [choice["text"] for choice in body["choices"]] == ["A0", "A1", "B2", "B3"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_chat_answer_shape() -> None:
    answer = ChatAnswer(AnswerHead("chatcmpl-1", "chat.completion", "demo", 7), [stream([1])], 1)
    answer.add(0, delta("Hel", [1]))
    answer.add(0, delta("lo", [2], "length"))
    assert answer.body(USAGE) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": USAGE,
    }
