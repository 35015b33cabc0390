"""More requests than there is room or time for: refused at once, ended in time, shared fairly."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
LONG = {"prompt": "def f():", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def post(server: Any, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=LONG | fields, timeout=120)


def running(server: Any) -> int:
    return int(server.metric("nanoflow_requests_running"))


def waiting(server: Any) -> int:
    return int(server.metric("nanoflow_requests_waiting"))


@contextlib.contextmanager
def busy(server: Any, count: int, wait_until: Any) -> Iterator[None]:
    """Long requests, one of which runs until the block ends, when their clients go away."""
    body = json.dumps(LONG).encode()
    address = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as clients:
        for _ in range(count):
            client = clients.enter_context(socket.create_connection(address))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: running(server) == 1, 20, "none of the long requests runs")
        wait_until(lambda: waiting(server) >= 2, 20, "none of the long requests waits")
        yield


def test_a_full_queue_answers_429_at_once(
    start_live: Start, assert_openai_error: Any, wait_until: Any
) -> None:
    small = start_live("--max-num-seqs", "1", "--max-num-queued-reqs", "2")
    prompt_tokens = post(small, max_tokens=1).json()["usage"]["prompt_tokens"]
    with busy(small, 3, wait_until):
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
    start_live: Start, assert_openai_error: Any, wait_until: Any
) -> None:
    server = start_live("--max-num-seqs", "1", "--policy", "priority")
    wordy = {"prompt": "def f(): pass\n" * 40, "max_tokens": 5}
    prompt_tokens = post(server, **wordy).json()["usage"]["prompt_tokens"]

    def queued_prompts() -> int:
        """How many of the wordy prompts wait: the others together are shorter than one."""
        return int(server.metric("nanoflow_queued_prompt_tokens") // prompt_tokens)

    with ThreadPoolExecutor(2) as pool:
        with busy(server, 12, wait_until):
            began = time.perf_counter()
            response = post(server, timeout_seconds=0.2)  # in vain, behind the long ones
            seconds = time.perf_counter() - began
            assert_openai_error(response, 408, "deadline_exceeded", "timeout_seconds")
            assert server.metric('nanoflow_requests_total{outcome="timeout"}') == 1
            (line,) = (line for line in server.log().splitlines() if "outcome=timeout" in line)
            found = re.search(r" output=0 queue=(\d+\.\d+) ttft=- total=", line)
            assert found is not None, line
            assert 0.2 <= float(found[1]) <= seconds, line

            assert queued_prompts() == 0
            late = pool.submit(post, server, **wordy, priority=3)
            wait_until(lambda: queued_prompts() == 1, 5, "the late one is not queued")
            urgent = pool.submit(post, server, **wordy, priority=-3)
            wait_until(lambda: queued_prompts() == 2, 5, "the urgent one is not queued")
        assert late.result().status_code == urgent.result().status_code == 200
    log = server.log()
    assert log.index(urgent.result().json()["id"]) < log.index(late.result().json()["id"])


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
        wait_until(
            lambda: len(ends) + running(server) + waiting(server) >= 16, 20, "not all have come"
        )
        pool.submit(ask, "few")
        wait_until(lambda: server.metric("nanoflow_tenants") == 2, 5, "not two tenants")
    assert len(ends) == 17
    assert ends.index("few") < 12
    assert "few" not in server.log()  # no key in the log
