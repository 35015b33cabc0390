"""More requests than there is room or time for: refused at once, ended in time, shared fairly."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
LONG = {"prompt": "def f():", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def post(server: Any, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=LONG | fields, timeout=120)


def stays_busy(server: Any, count: int) -> list[threading.Thread]:
    """Long requests that run or wait while the test looks."""
    threads = [threading.Thread(target=post, args=(server,), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while server.metric("nanoflow_requests_running") + server.metric(
        "nanoflow_requests_waiting"
    ) < min(count, 3):
        assert time.monotonic() < end
        time.sleep(0.05)
    return threads


def test_a_full_queue_answers_429_at_once(start_live: Start, assert_openai_error: Any) -> None:
    small = start_live("--max-num-seqs", "1", "--max-num-queued-reqs", "2")
    prompt_tokens = post(small, max_tokens=1).json()["usage"]["prompt_tokens"]
    stays_busy(small, 3)
    assert small.metric("nanoflow_queued_prompt_tokens") == 2 * prompt_tokens
    assert small.metric("nanoflow_requests_restoring") == 0
    assert small.metric("nanoflow_tenants") == 1
    seconds = []
    client = httpx.Client()
    for _ in range(3):
        began = time.perf_counter()
        response = client.post(f"{small.url}/v1/completions", json=LONG)
        seconds.append(time.perf_counter() - began)
        error = assert_openai_error(response, 429, "queue_full")
        assert "too many requests" in error["message"]
        assert response.headers["retry-after"] == "1"
    assert min(seconds) < 0.05, seconds  # before anything is done with the prompt
    # What clients sort errors by: nothing in it says that a retry is of no use.
    assert not any(word in error["message"].lower() for word in ("capacity", "key", "invalid"))
    assert post(small, stream=True).status_code == 429
    assert small.metric('nanoflow_requests_total{outcome="queue_full"}') == 4
    assert small.metric('nanoflow_requests_total{outcome="rejected"}') == 0
    assert small.log().count("status=429 code=queue_full") == 4
    theirs = openai.OpenAI(base_url=f"{small.url}/v1", api_key="-", max_retries=0)
    with pytest.raises(openai.RateLimitError, match="too many requests"):
        theirs.completions.create(model="nanoflow-demo", prompt="x", max_tokens=5)


def test_a_request_that_runs_out_of_time_keeps_its_tokens(live: Any) -> None:
    began = time.perf_counter()
    response = post(live, timeout_seconds=0.4)
    body = response.json()
    assert 0.3 < time.perf_counter() - began < 5
    assert response.status_code == 200
    assert body["choices"][0]["finish_reason"] == "length"
    tokens = body["usage"]["completion_tokens"]
    assert 0 < tokens < 900
    line = next(line for line in live.log().splitlines() if body["id"] in line)
    assert f"outcome=timeout prompt={body['usage']['prompt_tokens']} " in line
    assert f"output={tokens} queue=0." in line


def test_priorities_and_deadlines_are_looked_at(
    start_live: Start, assert_openai_error: Any
) -> None:
    server = start_live("--max-num-seqs", "1", "--policy", "priority")
    stays_busy(server, 2)
    response = post(server, timeout_seconds=0.2)  # in vain, behind the long ones
    assert_openai_error(response, 408, "deadline_exceeded", "timeout_seconds")
    assert server.metric('nanoflow_requests_total{outcome="timeout"}') == 1
    (line,) = (line for line in server.log().splitlines() if "outcome=timeout" in line)
    assert re.search(r" output=0 queue=0\.[2-9]\d* ttft=- total=", line), line
    with ThreadPoolExecutor(2) as pool:
        ends: list[str] = []

        def ask(name: str, priority: int) -> None:
            assert post(server, max_tokens=5, priority=priority).status_code == 200
            ends.append(name)

        pool.submit(ask, "late", 3)
        time.sleep(0.2)
        pool.submit(ask, "urgent", -3)
    assert ends == ["urgent", "late"]


def test_service_levels_are_taken(start_live: Start) -> None:
    server = start_live(
        "--policy", "slo", "--service-level", "chat:0.5,0.05", "--service-level", "5,1"
    )
    for request_class in ("chat", "", "unknown"):
        assert post(server, max_tokens=8, request_class=request_class).status_code == 200


def test_a_key_is_a_tenant(start_live: Start, wait_until: Any) -> None:
    """Beside somebody with many requests, the first of somebody else does not wait for all."""
    server = start_live("--max-num-seqs", "1", "--max-num-queued-reqs", "100")
    ends: list[str] = []

    def ask(key: str) -> None:
        httpx.post(
            f"{server.url}/v1/completions",
            json=LONG | {"max_tokens": 300},
            headers={"authorization": f"Bearer {key}"},
            timeout=120,
        )
        ends.append(key)

    with ThreadPoolExecutor(20) as pool:
        for _ in range(16):
            pool.submit(ask, "many")
        time.sleep(0.3)
        pool.submit(ask, "few")
        wait_until(lambda: server.metric("nanoflow_tenants") == 2, 5, "not two tenants")
    assert len(ends) == 17
    assert ends.index("few") < 12
    assert "few" not in server.log()  # no key in the log
