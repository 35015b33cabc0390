"""Whatever a client sends: one error shape, and an engine that goes on."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Check = Callable[..., dict[str, Any]]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
VALID: dict[str, dict[str, Any]] = {CHAT: {"messages": USER}, TEXT: {"prompt": "x = "}}

# field, value, code; sent to both generating routes
BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("model", 7, "invalid_value"),
    ("stream", "yes", "invalid_value"),
    ("stream_options", {"include_usage": True}, "invalid_value"),
    ("temperature", -0.1, "invalid_value"),
    ("temperature", "warm", "invalid_value"),
    ("temperature", True, "invalid_value"),
    ("top_p", 0, "invalid_value"),
    ("top_p", 1.1, "invalid_value"),
    ("top_k", -2, "invalid_value"),
    ("min_p", 2, "invalid_value"),
    ("n", 0, "invalid_value"),
    ("n", 17, "invalid_value"),
    ("n", 10**6, "invalid_value"),
    ("max_tokens", 0, "invalid_value"),
    ("max_tokens", -1, "invalid_value"),
    ("max_tokens", 1.5, "invalid_value"),
    ("max_tokens", 2**63, "context_length_exceeded"),
    ("min_tokens", -1, "invalid_value"),
    ("presence_penalty", 3, "invalid_value"),
    ("frequency_penalty", -3, "invalid_value"),
    ("repetition_penalty", 0, "invalid_value"),
    ("seed", 2**70, "invalid_value"),
    ("seed", "x", "invalid_value"),
    ("stop", "", "invalid_value"),
    ("stop", ["a", ""], "invalid_value"),
    ("stop", ["a"] * 17, "invalid_value"),
    ("stop", ["a"] * 1000, "invalid_value"),
    ("stop", 5, "invalid_value"),
    ("stop", [5], "invalid_value"),
    ("stop_token_ids", [-1], "invalid_value"),
    ("stop_token_ids", [10**8], "invalid_value"),
    ("stop_token_ids", ["a"], "invalid_value"),
    ("logit_bias", {"a": 1}, "invalid_value"),
    ("logit_bias", {"-1": 1}, "invalid_value"),
    ("logit_bias", {"1": 101}, "invalid_value"),
    ("logit_bias", {"1": "x"}, "invalid_value"),
    ("logit_bias", {"99999999": 1}, "invalid_value"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "invalid_value"),
    ("logit_bias", [1], "invalid_value"),
    ("prompt_logprobs", 21, "invalid_value"),
    ("logprobs", 21, "invalid_value"),
    ("tools", [{"type": "function"}], "unsupported_parameter"),
    ("tool_choice", "auto", "unsupported_parameter"),
    ("response_format", {"type": "json_object"}, "unsupported_parameter"),
    ("modalities", ["text", "audio"], "unsupported_parameter"),
    ("audio", {"voice": "x"}, "unsupported_parameter"),
    ("best_of", 2, "unsupported_parameter"),
    ("suffix", "end", "unsupported_parameter"),
    ("guided_json", {}, "unsupported_parameter"),
    ("priority", "high", "invalid_value"),
    ("priority", 10**6, "invalid_value"),
    ("request_class", 3, "invalid_value"),
    ("timeout_seconds", 0, "invalid_value"),
    ("timeout_seconds", "1", "invalid_value"),
]

BAD_PROMPTS: list[Any] = [
    *(None, 5, {}, True, "", [], [""], [[]]),
    *(["a", ""], ["a", 1], ["a", [1]], [1.5], [[1], "a"], [True]),
    *([-1], [10**8], [[1], [10**8]], ["x"] * 1025),
]

BAD_MESSAGES: list[Any] = [
    *(None, "hi", [], [5], [{}], {"role": "user"}),
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "wizard", "content": "hi"}],
    [{"content": "hi"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": ["hi"]}],
    [5] * 5000,
]

BAD_BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "not json": b"hello",
    "truncated": b'{"prompt": "a',
    "trailing": b'{"prompt": "a"} x',
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a key": b'{"prompt": "a", "\\udfff": 1}',
    "nested": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge number": b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
}


@pytest.fixture
def engine_unharmed(live: Any) -> Any:
    """The server before and after: alive, idle, and with the same answer as ever."""
    question = {"prompt": "def fibonacci(n):", "max_tokens": 4, "temperature": 0}
    before = httpx.post(f"{live.url}{TEXT}", json=question).json()["choices"]
    yield
    after = httpx.post(f"{live.url}{TEXT}", json=question, timeout=20)
    assert after.status_code == 200
    assert after.json()["choices"] == before
    assert live.metric("nanoflow_requests_running") == 0
    assert live.metric("nanoflow_requests_waiting") == 0
    assert httpx.get(f"{live.url}/health").status_code == 200


def post(live: Any, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{live.url}{path}", json={**VALID[path], **fields}, timeout=90)


@pytest.mark.usefixtures("engine_unharmed")
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bad_fields(live: Any, assert_openai_error: Check, path: str) -> None:
    for field, value, code in BAD_FIELDS:
        for stream in (False, True):
            fields = (
                {field: value}
                if field in ("stream", "stream_options")
                else {
                    "stream": stream,
                    field: value,
                }
            )
            response = post(live, path, **fields)
            error = assert_openai_error(response, 400, code)
            assert (error["param"] or "").startswith(field), (field, value, error)


@pytest.mark.usefixtures("engine_unharmed")
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_none(
    live: Any, assert_openai_error: Check, field: str, number: str
) -> None:
    for path in (CHAT, TEXT):
        body = json.dumps({**VALID[path], field: 0.5}).replace("0.5", number)
        response = httpx.post(
            f"{live.url}{path}", content=body, headers={"content-type": "application/json"}
        )
        assert_openai_error(response, 400, "invalid_value", field)


@pytest.mark.usefixtures("engine_unharmed")
def test_bad_prompts(live: Any, assert_openai_error: Check) -> None:
    for prompt in BAD_PROMPTS:
        for stream in (False, True):
            response = post(live, TEXT, prompt=prompt, stream=stream)
            error = assert_openai_error(response, 400, "invalid_value", "prompt")
            assert len(error["message"]) < 400
    response = httpx.post(f"{live.url}{TEXT}", json={"max_tokens": 1})
    assert_openai_error(response, 400, "missing_required_parameter", "prompt")


@pytest.mark.usefixtures("engine_unharmed")
def test_bad_messages(live: Any, assert_openai_error: Check) -> None:
    for messages in BAD_MESSAGES:
        response = post(live, CHAT, messages=messages)
        assert response.status_code == 400, (messages, response.text)
        error = assert_openai_error(response, 400, response.json()["error"]["code"])
        assert error["param"].startswith("messages")
    response = httpx.post(f"{live.url}{CHAT}", json={})
    assert_openai_error(response, 400, "missing_required_parameter", "messages")
    response = post(live, CHAT, top_logprobs=2)
    assert_openai_error(response, 400, "invalid_value", "top_logprobs")
    response = post(live, CHAT, logprobs=True, top_logprobs=21)
    assert_openai_error(response, 400, "invalid_value", "top_logprobs")
    for name in ("chat_template", "tools", "messages", "tokenize", "add_generation_prompt"):
        response = post(live, CHAT, chat_template_kwargs={name: "{% for i in range(9**9) %}"})
        assert_openai_error(response, 400, "invalid_value", "chat_template_kwargs")
    response = post(live, CHAT, max_completion_tokens=0)
    assert_openai_error(response, 400, "invalid_value", "max_completion_tokens")


@pytest.mark.usefixtures("engine_unharmed")
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies(live: Any, assert_openai_error: Check, body: bytes) -> None:
    for path in (CHAT, TEXT):
        response = httpx.post(
            f"{live.url}{path}", content=body, headers={"content-type": "application/json"}
        )
        assert_openai_error(response, 400, "invalid_json", None)


@pytest.mark.usefixtures("engine_unharmed")
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_type(
    live: Any, assert_openai_error: Check, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = httpx.post(f"{live.url}{TEXT}", content=b'{"prompt": "a"}', headers=headers)
    error = assert_openai_error(response, 400, "unsupported_content_type")
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.usefixtures("engine_unharmed")
def test_content_type_with_a_charset_is_fine(live: Any) -> None:
    response = httpx.post(
        f"{live.url}{TEXT}",
        content=b'{"prompt": "a", "max_tokens": 1}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert response.status_code == 200


@pytest.mark.usefixtures("engine_unharmed")
def test_too_large_bodies(live: Any, assert_openai_error: Check) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    headers = {"content-type": "application/json"}
    for path in (CHAT, TEXT):
        response = httpx.post(f"{live.url}{path}", content=body, headers=headers, timeout=30)
        assert_openai_error(response, 413, "request_too_large")

        def chunks() -> Any:
            for start in range(0, len(body), 1 << 16):
                yield body[start : start + (1 << 16)]

        response = httpx.post(f"{live.url}{path}", content=chunks(), headers=headers, timeout=30)
        assert "content-length" not in response.request.headers
        assert_openai_error(response, 413, "request_too_large")
    assert live.log().count(" status=413 code=request_too_large ") >= 4


@pytest.mark.usefixtures("engine_unharmed")
def test_announced_size_is_refused_before_it_is_sent(live: Any) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000000000\r\n\r\n"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.usefixtures("engine_unharmed")
def test_prompts_longer_than_the_context(live: Any, assert_openai_error: Check) -> None:
    limit = httpx.get(f"{live.url}/v1/models").json()["data"][0]["max_model_len"]
    long = "a = 1\n" * limit
    cases = [
        (TEXT, {"prompt": long}, "prompt"),
        (TEXT, {"prompt": [5] * limit}, "prompt"),
        (TEXT, {"prompt": [[5], [5] * (limit + 1)]}, "prompt"),
        (TEXT, {"prompt": [5] * (limit - 2), "max_tokens": 3}, "max_tokens"),
        (TEXT, {"max_tokens": limit}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
        (CHAT, {"max_completion_tokens": limit}, "max_completion_tokens"),
    ]
    rejected = 'nanoflow_requests_total{outcome="rejected"}'
    before = live.metric(rejected), live.log().count(" status=400 code=context_length_exceeded ")
    for path, fields, param in cases:
        for stream in (False, True):
            response = post(live, path, stream=stream, **fields)
            error = assert_openai_error(response, 400, "context_length_exceeded", param)
            assert f"maximum context length is {limit} tokens" in error["message"]
    after = live.metric(rejected), live.log().count(" status=400 code=context_length_exceeded ")
    assert [new - old for new, old in zip(after, before, strict=True)] == [2 * len(cases)] * 2
    fitting = post(live, TEXT, prompt=[5] * (limit - 1))
    assert fitting.status_code == 200
    assert fitting.json()["usage"]["completion_tokens"] == 1


@pytest.mark.usefixtures("engine_unharmed")
def test_a_prompt_of_8_mb_is_refused_and_holds_nobody_up(
    live: Any, assert_openai_error: Check
) -> None:
    answers: list[httpx.Response] = []
    prompt = "x = 1\n" * 1_150_000
    thread = threading.Thread(target=lambda: answers.append(post(live, TEXT, prompt=prompt)))
    thread.start()
    slowest = 0.0
    with httpx.Client(timeout=60) as client:
        while thread.is_alive():
            start = time.monotonic()
            assert client.get(f"{live.url}/health").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.01)
    assert_openai_error(answers[0], 400, "context_length_exceeded", "prompt")
    assert slowest < 1.5


@pytest.mark.usefixtures("engine_unharmed")
def test_unknown_model(live: Any, assert_openai_error: Check) -> None:
    for path in (CHAT, TEXT):
        for name in ("gpt-4", "", "../x", "x" * 10_000, "\u0000"):
            error = assert_openai_error(
                post(live, path, model=name), 404, "model_not_found", "model"
            )
            assert len(error["message"]) < 500
    response = httpx.get(f"{live.url}/v1/models/gpt-4")
    assert_openai_error(response, 404, "model_not_found", "model")


@pytest.mark.usefixtures("engine_unharmed")
def test_error_size_is_bounded(live: Any, assert_openai_error: Check) -> None:
    many = {f"x{i}" * 20: "y" * 100 for i in range(100)}
    bodies = [
        {"prompt": "a", "logit_bias": {"z" * 1_000_000: 1}},
        {"prompt": "a", "temperature": "z" * 1_000_000},
        {"prompt": "a", "stop_token_ids": ["z" * 1000] * 1000},
        {"prompt": [["z" * 1000]] * 1000},
        {"messages": [{"role": "z" * 1000, "content": [many]}] * 30},
        {name: [] for name in ("n", "top_p", "top_k", "seed", "stop", "echo", "stream", "min_p")},
    ]
    for path in (CHAT, TEXT):
        for body in bodies:
            response = httpx.post(f"{live.url}{path}", json=body, timeout=30)
            assert_openai_error(response, 400, response.json()["error"]["code"])
            assert len(response.content) < 3000


@pytest.mark.usefixtures("engine_unharmed")
def test_several_errors_are_reported_together(live: Any, assert_openai_error: Check) -> None:
    response = post(live, TEXT, n="two", temperature="warm", echo="loud")
    error = assert_openai_error(response, 400, "invalid_value", "n")
    assert re.search(r"n: .*; temperature: .*; echo: ", error["message"])


@pytest.mark.usefixtures("engine_unharmed")
def test_odd_but_valid_input(live: Any) -> None:
    for prompt in ("\u0000", "😀\u202e", "\ufeff", "\r\n", " " * 50, "<|endoftext|>"):
        assert post(live, TEXT, prompt=prompt, max_tokens=2).status_code == 200, prompt
    neutral = {"tools": [], "tool_choice": "none", "suffix": None, "best_of": 1, "max_tokens": 1}
    assert post(live, TEXT, **neutral).status_code == 200
    neutral = {"response_format": {"type": "text"}, "stop": [], "n": None, "max_tokens": 1}
    assert post(live, CHAT, **neutral).status_code == 200


ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("POST", TEXT),
    ("POST", CHAT),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/version"),
]


@pytest.mark.usefixtures("engine_unharmed")
def test_every_route_in_one_error_shape(live: Any, assert_openai_error: Check) -> None:
    for method, path in ROUTES:
        for wrong in {"GET", "POST", "PUT", "DELETE", "PATCH"} - {method}:
            response = httpx.request(wrong, f"{live.url}{path}")
            assert_openai_error(response, 405, "method_not_allowed", None)
            assert method in response.headers["allow"]
    for path in (
        "/",
        "/v1",
        "/v1/completions/",
        "/v1/chat",
        "/dashboard/billing/usage",
        "/x" * 500,
    ):
        for method in ("GET", "POST"):
            response = httpx.request(method, f"{live.url}{path}")
            error = assert_openai_error(response, 404, "not_found", None)
            assert len(error["message"]) < 400
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert_openai_error(httpx.get(f"{live.url}{path}"), 404, "not_found")


def test_server_errors_are_not_taken_for_client_errors() -> None:
    """Clients classify messages by the first keyword that they find, in this order."""
    from nf_server.errors import engine_unavailable, internal_error, server_stopping

    classes = [
        r"quota|capacity|credit|billing|balance",
        r"rate limit|429|too many requests",
        r"auth|key|401",
        r"invalid|400|format|parameter",
        r"server|503|502|500|unavailable",
    ]
    for error in (engine_unavailable(), internal_error(), server_stopping()):
        found = [bool(re.search(words, error.message.lower())) for words in classes]
        assert found.index(True) == 4, error.message
