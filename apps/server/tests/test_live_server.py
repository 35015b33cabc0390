"""What the API answers, from the real engine with the demo model over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx

PROMPT = "def fibonacci(n):"


def complete(live: Any, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{live.url}/v1/completions", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def chat(live: Any, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "import os\n"}], **fields}
    response = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(live: Any, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = httpx.post(f"{live.url}{path}", json={**fields, "stream": True}, timeout=60)
    assert response.status_code == 200, response.text
    *frames, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def streamed_text(parts: list[dict[str, Any]]) -> str:
    return "".join(part["choices"][0]["text"] for part in parts if part["choices"])


def test_banner(live: Any) -> None:
    assert "nanoflow-demo" in live.banner
    assert "temperature=0.4" in live.banner
    assert f"Ready on {live.url}" in live.banner
    start = live.banner.split("Start\n")[1]
    assert " s\n" in start
    phases = [line.split()[0] for line in start.splitlines()[:6]]
    assert phases == ["import", "weights", "kv_cache", "compile", "warm_up", "until"]
    assert "\n  Overlap: auto, no plans measured for this model on this device" in live.banner


def test_models(live: Any) -> None:
    listed = httpx.get(f"{live.url}/v1/models").json()
    assert listed["object"] == "list"
    card = listed["data"][0]
    assert set(card) == {
        *("id", "object", "created", "owned_by", "root", "parent", "max_model_len"),
    }
    assert (card["id"], card["object"]) == ("nanoflow-demo", "model")
    assert card["max_model_len"] > 100
    assert httpx.get(f"{live.url}/v1/models/nanoflow-demo").json() == card
    for other in listed["data"]:
        assert httpx.get(f"{live.url}/v1/models/{other['id']}").json() == other


def test_version_and_health(live: Any) -> None:
    assert httpx.get(f"{live.url}/version").json() == {"version": "0.1.0"}
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}


def test_completion_shape(live: Any) -> None:
    body = complete(live, model="nanoflow-demo", prompt=PROMPT, temperature=0)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "nanoflow-demo"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["text"]
    assert choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + 16
    details = usage["prompt_tokens_details"]
    assert set(details) == {"cached_tokens", "nanoflow_cached_tokens_by_tier"}
    assert set(details["nanoflow_cached_tokens_by_tier"]) == {"device", "host", "disk"}


def test_chat_shape_and_default_length(live: Any) -> None:
    body = chat(live, temperature=0, max_tokens=5)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    limit = httpx.get(f"{live.url}/v1/models").json()["data"][0]["max_model_len"]
    whole = chat(live, ignore_eos=True)
    assert whole["usage"]["total_tokens"] == limit
    assert whole["choices"][0]["finish_reason"] == "length"


def test_streams_equal_what_is_not_streamed(live: Any) -> None:
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    body = complete(live, **fields)
    parts = chunks(live, "/v1/completions", **fields, stream_options={"include_usage": True})
    assert streamed_text(parts) == body["choices"][0]["text"]
    assert [part["usage"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["usage"]["completion_tokens"] == 40
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert {part["object"] for part in parts} == {"text_completion"}


def test_chat_streams_equal_what_is_not_streamed(live: Any) -> None:
    messages = [{"role": "user", "content": "class Stack:\n"}]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 40}
    body = chat(live, **fields)
    parts = chunks(live, "/v1/chat/completions", **fields)
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == body["choices"][0]["message"]["content"]
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-1]["choices"][0]["delta"] == {}
    assert parts[-1]["choices"][0]["finish_reason"] == body["choices"][0]["finish_reason"]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_continuous_usage_counts_up(live: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(live, "/v1/completions", prompt=PROMPT, max_tokens=12, stream_options=options)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert counts[0] < 12


def test_token_ids_and_several_prompts(live: Any) -> None:
    fields = {"temperature": 0, "max_tokens": 8}
    texts = [complete(live, prompt=p, **fields)["choices"][0]["text"] for p in ("x = ", "def ")]
    together = complete(live, prompt=["x = ", "def "], **fields)
    assert [choice["text"] for choice in together["choices"]] == texts
    assert [choice["index"] for choice in together["choices"]] == [0, 1]
    ids = complete(live, prompt=[[5, 6, 7], [8, 9]], **fields)
    assert ids["usage"]["prompt_tokens"] == 5
    single = complete(live, prompt=[5, 6, 7], **fields)
    assert single["choices"][0]["text"] == ids["choices"][0]["text"]
    assert single["usage"]["prompt_tokens"] == 3


def test_n_choices(live: Any) -> None:
    fields = {"prompt": PROMPT, "n": 3, "seed": 11, "temperature": 1.5, "max_tokens": 12}
    body = complete(live, **fields)
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 3
    assert body["usage"]["completion_tokens"] == 36
    parts = chunks(live, "/v1/completions", **fields)
    for index in range(3):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == texts[index]
        assert [choice["finish_reason"] for choice in mine][-1] == "length"


def test_echo(live: Any) -> None:
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain = complete(live, **fields)["choices"][0]["text"]
    assert complete(live, **fields, echo=True)["choices"][0]["text"] == PROMPT + plain
    assert streamed_text(chunks(live, "/v1/completions", **fields, echo=True)) == PROMPT + plain


def test_stop_strings_are_cut_wherever_tokens_end(live: Any) -> None:
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 48}
    whole = complete(live, **fields)["choices"][0]["text"]
    for start in range(3, 20):
        stop = whole[start : start + 3]
        expected = whole[: whole.index(stop)]
        body = complete(live, **fields, stop=[stop, "\u0001 never"])
        assert body["choices"][0]["text"] == expected
        assert body["choices"][0]["finish_reason"] == "stop"
        parts = chunks(live, "/v1/completions", **fields, stop=stop)
        assert streamed_text(parts) == expected
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    kept = complete(live, **fields, stop=whole[5:8], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == whole[: whole.index(whole[5:8]) + 3]


def test_text_is_never_broken_inside_a_character(live: Any) -> None:
    # Bias towards the bytes of an emoji makes tokens that are parts of characters.
    fields = {"prompt": "# 😀😀😀", "max_tokens": 60, "temperature": 1.2, "seed": 3}
    echo = complete(live, **fields, echo=True)["choices"][0]["text"]
    assert echo.startswith("# 😀😀😀")
    body = complete(live, **fields)
    parts = chunks(live, "/v1/completions", **fields)
    assert streamed_text(parts) == body["choices"][0]["text"]


def test_completion_logprobs(live: Any) -> None:
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 3}
    (choice,) = complete(live, **fields)["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6
    for token, logprob, top, offset in zip(
        *(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")),
        strict=True,
    ):
        assert top[token] == logprob == max(top.values()) <= 0
        assert len(top) == 3
        assert choice["text"][offset:].startswith(token)
    parts = chunks(live, "/v1/completions", **fields)
    for key, values in logprobs.items():
        shown = [part["choices"][0]["logprobs"] for part in parts]
        assert [value for one in shown if one for value in one[key]] == values


def test_echoed_logprobs_cover_the_prompt(live: Any) -> None:
    (choice,) = complete(live, prompt=PROMPT, max_tokens=2, echo=True, logprobs=1)["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    parts = chunks(
        live, "/v1/completions", prompt=PROMPT, max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    assert streamed_text(parts).startswith(PROMPT)


def test_chat_logprobs(live: Any) -> None:
    body = chat(live, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]
    plain = chat(live, temperature=0, max_tokens=4, logprobs=True)
    assert [t["top_logprobs"] for t in plain["choices"][0]["logprobs"]["content"]] == [[]] * 4


def test_prompt_logprobs(live: Any) -> None:
    (choice,) = complete(live, prompt=PROMPT, max_tokens=1, prompt_logprobs=2)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert all(set(v) == {"logprob", "rank", "decoded_token"} for r in rest for v in r.values())
    assert "prompt_logprobs" in chat(live, max_tokens=1, prompt_logprobs=0)


def test_seeds_repeat_and_defaults_come_from_the_model(live: Any) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 24, "seed": 5}
    first = complete(live, **fields)["choices"][0]["text"]
    assert complete(live, **fields)["choices"][0]["text"] == first
    explicit = complete(live, **fields, temperature=0.4, top_p=0.95)
    assert explicit["choices"][0]["text"] == first


def test_min_tokens_and_ignore_eos(live: Any) -> None:
    eos = {"0": 100}
    body = complete(live, prompt=PROMPT, max_tokens=9, logit_bias=eos)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["text"] == ""
    body = complete(live, prompt=PROMPT, max_tokens=9, logit_bias=eos, min_tokens=3)
    assert body["usage"]["completion_tokens"] == 4
    body = complete(live, prompt=PROMPT, max_tokens=9, logit_bias=eos, ignore_eos=True)
    assert body["choices"][0]["finish_reason"] == "length"


def test_repeated_prompts_are_cached(live: Any) -> None:
    prompt = "# a prompt that is longer than a page of the cache\n" * 4
    complete(live, prompt=prompt, max_tokens=1)
    hits = live.metric('nanoflow_prefix_tokens_total{result="hit_device"}')
    usage = complete(live, prompt=prompt, max_tokens=1)["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 16 <= cached < usage["prompt_tokens"]
    assert live.metric('nanoflow_prefix_tokens_total{result="hit_device"}') >= hits + cached


def test_counters_move(live: Any) -> None:
    names = (
        'nanoflow_requests_total{outcome="length"}',
        "nanoflow_generation_tokens_total",
        "nanoflow_prompt_tokens_total",
        "nanoflow_iterations_total",
        "nanoflow_time_to_first_token_seconds_count",
        "nanoflow_request_queue_seconds_count",
        "nanoflow_last_step_timestamp_seconds",
    )
    before = [live.metric(name) for name in names]
    usage = complete(live, prompt=[5, 6, 7], max_tokens=10, ignore_eos=True)["usage"]
    after = [live.metric(name) for name in names]
    gained = [new - old for new, old in zip(after, before, strict=True)]
    assert gained[:3] == [1, usage["completion_tokens"], 3]
    assert gained[3] >= 10
    assert gained[4:6] == [1, 1]
    assert 0 < gained[6] < 600
    assert "outcome=length prompt=3 cached=0 output=10 queue=0." in live.log()


def test_a_vanished_client_frees_its_request(live: Any, wait_until: Any) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    wait_until(lambda: live.metric("nanoflow_requests_running") == 0, 5, "not idle before")
    for stream in (True, False):
        body = json.dumps(
            {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": stream}
        )
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body.encode())
            )
            if stream:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: live.metric("nanoflow_requests_running") == 1, 5, "not running")
        wait_until(
            lambda: (
                live.metric("nanoflow_requests_running") == 0
                and live.metric('nanoflow_kv_pages{state="used",tier="device"}') == 0
            ),
            3,
            "the request was not withdrawn",
        )
    wait_until(lambda: live.log().count("outcome=abort_client") >= 2, 3, "no log line")


def test_32_concurrent_streams_all_complete(live: Any) -> None:
    expected = complete(live, prompt="x0 = ", max_tokens=60, ignore_eos=True, temperature=0)
    results: list[list[dict[str, Any]] | None] = [None] * 32

    def work(number: int) -> None:
        results[number] = chunks(
            live,
            "/v1/completions",
            prompt=f"x{number} = ",
            max_tokens=60,
            ignore_eos=True,
            temperature=0,
            stream_options={"include_usage": True},
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    for parts in results:
        assert parts is not None
        assert parts[-1]["usage"]["completion_tokens"] == 60
        assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert results[0] is not None
    shared = streamed_text(results[0])[:10]
    assert expected["choices"][0]["text"].startswith(shared[:3])


def test_connections_are_kept_alive(live: Any) -> None:
    with httpx.Client(base_url=live.url) as client:
        for _ in range(3):
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            client.post("/v1/completions", json={"prompt": ""})
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True})
        pool: Any = client._transport
        assert len(pool._pool.connections) == 1
