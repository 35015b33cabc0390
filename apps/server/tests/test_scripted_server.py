"""Timing and failure over a real socket, with a scripted engine."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from nf_runtime import ChoiceDelta, EngineDeadError, InvalidRequestError, OverloadedError

Start = Callable[..., Any]


def delta(
    text: str = "", ids: list[int] | None = None, finish: str | None = None, index: int = 0
) -> ChoiceDelta:
    return ChoiceDelta(
        index=index,
        text=text,
        token_ids=ids or [],
        logprobs=None,
        finish_reason=finish,
        stop_reason=None,
    )


HELLO = [[delta("Hel", [1])], [delta("lo", [2])], [delta("", [3], "stop")]]


def chat(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)


def complete(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "scripted", "prompt": "hi", **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=20)


def test_stream_headers_and_frames(scripted: Start) -> None:
    response = chat(scripted(HELLO).url, stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert "content-length" not in response.headers
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello"
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_tokens_are_not_held_back(scripted: Start) -> None:
    server = scripted([[delta("a", [1])], 0.5, [delta("b", [2])], 0.5, [delta("", [3], "stop")]])
    body = {"prompt": "hi", "stream": True}
    arrivals = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append((time.monotonic(), json.loads(line[6:])["choices"][0]["text"]))
    assert [text for _, text in arrivals] == ["a", "b", ""]
    assert arrivals[1][0] - arrivals[0][0] > 0.3
    assert arrivals[2][0] - arrivals[1][0] > 0.3


def test_what_arrived_together_leaves_together(scripted: Start) -> None:
    server = scripted(
        [[delta("a", [1]), delta("x", [9], "stop", index=1)], [delta("b", [2], "stop")]]
    )
    response = complete(server.url, n=2, stream=True)
    chunks = [json.loads(f[6:]) for f in response.text.split("\n\n") if f.startswith("data: {")]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "ab", 1: "x"}


def test_several_prompts_are_merged(scripted: Start) -> None:
    server = scripted([[delta("a", [1])], 0.01, [delta("b", [2], "length")]])
    for stream in (False, True):
        response = complete(server.url, prompt=["p", "q", "r"], stream=stream)
        assert response.status_code == 200
        if not stream:
            assert [c["text"] for c in response.json()["choices"]] == ["ab"] * 3
            assert response.json()["usage"]["prompt_tokens"] == 3
            assert response.json()["usage"]["completion_tokens"] == 6
    assert [prompt for prompt, _ in server.engine.submitted] == [[112], [113], [114]] * 2


def test_engine_death_mid_stream_is_an_error_frame_then_done(scripted: Start) -> None:
    server = scripted([[delta("a", [1])], EngineDeadError("boom")])
    response = chat(server.url, stream=True)
    assert response.status_code == 200
    frames = response.text.split("\n\n")
    assert frames[-2] == "data: [DONE]"
    error = json.loads(frames[-3].removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    assert error["type"] == "server_error"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.APIError, match="engine process has stopped"):
        for _ in client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "hi"}], stream=True
        ):
            pass
    assert server.service.num_active == 0


def test_engine_death_without_stream(scripted: Start, assert_openai_error: Any) -> None:
    server = scripted([[delta("a", [1])], EngineDeadError("boom")])
    response = chat(server.url)
    assert_openai_error(response, 503, "engine_dead")
    assert response.headers["retry-after"] == "5"
    assert server.engine.streams[0].closed


def test_dead_engine_refuses_and_is_unhealthy(scripted: Start, assert_openai_error: Any) -> None:
    server = scripted(HELLO)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.engine.dead_reason = "killed by signal 9"
    assert_openai_error(chat(server.url), 503, "engine_dead")
    assert_openai_error(chat(server.url, stream=True), 503, "engine_dead")
    error = assert_openai_error(httpx.get(f"{server.url}/health"), 503, "engine_dead")
    assert "killed by signal 9" in error["message"]


def test_unexpected_exception_is_a_500_in_the_shape(
    scripted: Start, assert_openai_error: Any
) -> None:
    server = scripted([[delta("a", [1])], RuntimeError("secret detail")])
    response = chat(server.url)
    error = assert_openai_error(response, 500, "internal_error")
    assert "secret" not in error["message"]
    assert response.headers["x-should-retry"] == "false"
    stream = chat(server.url, stream=True)
    assert '"code": "internal_error"' in stream.text
    assert "secret" not in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert server.service.num_active == 0


def test_engine_refusal_is_a_400(
    scripted: Start, assert_openai_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scripted(HELLO)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InvalidRequestError("logit_bias names token 999999", param="logit_bias")

    monkeypatch.setattr(server.engine, "submit", refuse)
    assert_openai_error(chat(server.url), 400, "invalid_value", "logit_bias")
    assert server.service.num_active == 0


def test_late_engine_refusal_is_a_400_or_an_error_frame(
    scripted: Start, assert_openai_error: Any
) -> None:
    server = scripted([InvalidRequestError("the prompt needs more pages than there are")])
    assert_openai_error(chat(server.url), 400, "invalid_value")
    stream = chat(server.url, stream=True)
    assert '"type": "invalid_request_error"' in stream.text
    text = httpx.get(f"{server.url}/metrics").text
    assert 'nanoflow_requests_total{outcome="rejected"} 2.0' in text


def test_a_full_queue_is_no_bad_request(
    scripted: Start,
    assert_openai_error: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen by the engine, once it has the request, or before it gets it; counted as the same."""
    server = scripted([OverloadedError("5 requests are queued")])
    with caplog.at_level(logging.INFO, logger="nf_server.request"):
        late = chat(server.url)
        stream = chat(server.url, stream=True)

        def refuse() -> None:
            raise OverloadedError("too many requests")

        monkeypatch.setattr(server.engine, "check_load", refuse)
        early = chat(server.url, stream=True)
    for response in (late, early):
        assert_openai_error(response, 429, "queue_full")
        assert response.headers["retry-after"] == "1"
    assert stream.status_code == 200
    assert '"code": "queue_full"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'nanoflow_requests_total{outcome="queue_full"} 3.0' in text
    assert 'nanoflow_requests_total{outcome="rejected"} 0.0' in text
    assert "nanoflow_time_to_first_token_seconds_count 0.0" in text
    *finished, rejected = (record.getMessage() for record in caplog.records)
    assert ["outcome=queue_full " in line for line in finished] == [True, True]
    assert "status=429 code=queue_full" in rejected


def test_who_ran_out_of_time_in_the_queue_has_waited_and_had_no_token(
    scripted: Start, assert_openai_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = scripted([0.01, [delta(finish="timeout")]])
    ledger = SimpleNamespace(arrival=1.0, first_scheduled=None, finished=1.75, preemptions=0)
    server.engine.ledger = [ledger]
    with caplog.at_level(logging.INFO, logger="nf_server.request"):
        assert_openai_error(chat(server.url), 408, "deadline_exceeded", "timeout_seconds")
        stream = chat(server.url, stream=True)
    assert '"code": "deadline_exceeded"' in stream.text
    for record in caplog.records:
        assert "outcome=timeout prompt=2 cached=0 output=0 queue=0.7500 ttft=- total=0." in (
            record.getMessage()
        )
    text = httpx.get(f"{server.url}/metrics").text
    assert 'nanoflow_requests_total{outcome="timeout"} 2.0' in text
    assert "nanoflow_time_to_first_token_seconds_count 0.0" in text
    assert "nanoflow_request_queue_seconds_sum 1.5" in text
    assert "nanoflow_request_queue_seconds_count 2.0" in text


def test_who_ran_out_of_time_later_keeps_what_there_is(
    scripted: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = scripted([[delta("Hel", [1])], [delta("lo", [2])], [delta(finish="timeout")]])
    with caplog.at_level(logging.INFO, logger="nf_server.request"):
        body = chat(server.url).json()
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2
    (record,) = caplog.records
    assert "outcome=timeout prompt=2 cached=0 output=2 queue=0.2500 ttft=0." in record.getMessage()


def test_client_disconnect_closes_the_stream(scripted: Start, wait_until: Any) -> None:
    server = scripted([[delta("a", [1])], 60.0])
    for path, stream in (("completions", True), ("completions", False)):
        body = json.dumps({"prompt": "hi", "stream": stream}).encode()
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as sock:
            sock.sendall(
                b"POST /v1/%s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
            )
            wait_until(lambda: server.service.num_active == 1, 5, "not admitted")
        wait_until(lambda: server.service.num_active == 0, 5, "not withdrawn")
    assert all(stream.closed for stream in server.engine.streams)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'nanoflow_requests_total{outcome="abort_client"} 2.0' in text


def test_silent_streams_are_pinged(scripted: Start) -> None:
    server = scripted([0.7, [delta("a", [1], "stop")]], ping_seconds=0.1)
    response = chat(server.url, stream=True)
    assert response.text.count(": ping\n\n") >= 2
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
    chunks = client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a"


def test_stopping_server_ends_streams_with_an_error(
    scripted: Start, wait_until: Any, assert_openai_error: Any
) -> None:
    server = scripted([[delta("a", [1])], 60.0])
    answers: dict[bool, httpx.Response] = {}
    threads = [
        threading.Thread(
            target=lambda stream: answers.update({stream: chat(server.url, stream=stream)}),
            args=(stream,),
        )
        for stream in (False, True)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.service.num_active == 2, 5, "not admitted")
    server.loop.call_soon_threadsafe(server.service.stop_all)
    for thread in threads:
        thread.join(5)
    assert_openai_error(answers[False], 503, "server_shutdown")
    assert '"code": "server_shutdown"' in answers[True].text
    assert answers[True].text.endswith("data: [DONE]\n\n")
    assert_openai_error(chat(server.url), 503, "server_shutdown")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'nanoflow_requests_total{outcome="abort_server"} 2.0' in text


def test_request_id_is_echoed_or_made(scripted: Start) -> None:
    url = scripted(HELLO).url
    for path in ("/health", "/nothing", "/v1/models"):
        assert httpx.get(f"{url}{path}", headers={"x-request-id": "a-1"}).headers[
            "x-request-id"
        ] == ("a-1")
        made = httpx.get(f"{url}{path}").headers["x-request-id"]
        assert len(made) == 32
    for bad in ("with space", "x" * 129):
        response = httpx.get(f"{url}/health", headers={"x-request-id": bad})
        assert len(response.headers["x-request-id"]) == 32


def test_unknown_fields_are_named_in_a_header(
    scripted: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = scripted(HELLO)
    with caplog.at_level(logging.WARNING, logger="nf_server"):
        for _ in range(2):
            response = chat(server.url, enable_thinking=False, **{"x\ny": 1}, user="me")
            assert response.status_code == 200
            assert response.headers["x-nanoflow-warnings"] == (
                "ignored unknown fields: enable_thinking, x?y"
            )
    assert sum("enable_thinking" in record.getMessage() for record in caplog.records) == 1
    assert "x-nanoflow-warnings" not in chat(server.url, user="me").headers
    many = chat(server.url, stream=True, **{f"f{i}": i for i in range(100)})
    assert len(many.headers["x-nanoflow-warnings"]) < 1200
    assert many.headers["x-nanoflow-warnings"].endswith("and 84 more")


def test_one_log_line_per_request(scripted: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted(HELLO)
    with caplog.at_level(logging.INFO, logger="nf_server.request"):
        httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "hi"},
            headers={"x-request-id": "mine"},
        )
        complete(server.url, prompt="")
    done, rejected = (record.getMessage() for record in caplog.records)
    assert "request=mine model=scripted outcome=stop prompt=2 cached=0 output=3" in done
    assert "queue=0.2500 ttft=0." in done
    assert done.endswith("preemptions=2")
    assert done.startswith("finished id=cmpl-")
    assert rejected.startswith("rejected request=")
    assert "status=400 code=invalid_value" in rejected


def test_sampling_defaults_and_fields_reach_the_engine(scripted: Start) -> None:
    server = scripted(HELLO)
    server.service.defaults.update(temperature=0.25, top_p=0.5)
    complete(server.url, temperature=0, n=None, logit_bias={"3": -1}, stop="x", seed=7)
    params = server.engine.submitted[-1][1]
    assert (params.temperature, params.top_p, params.seed) == (0, 0.5, 7)
    assert params.logit_bias == {3: -1}
    assert params.stop_strings == ["x"]
    assert params.max_tokens == 16
    chat(server.url)
    assert server.engine.submitted[-1][1].max_tokens == 64 - 2
    chat(server.url, max_tokens=5, max_completion_tokens=7)
    assert server.engine.submitted[-1][1].max_tokens == 7
    complete(server.url, prompt="x" * 60)
    assert server.engine.submitted[-1][1].max_tokens == 4


def test_chat_messages_reach_the_template(scripted: Start, assert_openai_error: Any) -> None:
    server = scripted(HELLO)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]
    assert chat(server.url, messages=messages).status_code == 200
    prompt = bytes(server.engine.submitted[-1][0]).decode()
    assert prompt == "be brief\na\nb\n\nc"
    error = assert_openai_error(
        chat(server.url, chat_template_kwargs={"fail": True}), 400, "invalid_value", "messages"
    )
    assert "roles must alternate" in error["message"]
    server.engine.tokenizer.has_chat_template = False
    assert_openai_error(chat(server.url), 400, "chat_template_missing", "messages")


def test_long_prompts_do_not_stop_the_loop(scripted: Start, wait_until: Any) -> None:
    server = scripted(HELLO)
    started, release = threading.Event(), threading.Event()
    encode = server.engine.tokenizer.encode

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 10000:
            started.set()
            release.wait(10)
        return encode(text)

    server.engine.tokenizer.encode = slow
    thread = threading.Thread(target=complete, args=(server.url,), kwargs={"prompt": "x" * 20000})
    thread.start()
    assert started.wait(5)
    assert chat(server.url).status_code == 200
    release.set()
    thread.join(5)
