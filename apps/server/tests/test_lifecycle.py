"""Signals, and the death of either process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]


def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


class Streams:
    """Streams in threads, each read to its end or error."""

    def __init__(self, server: Any, count: int, tokens: int) -> None:
        self.texts = [""] * count
        self.errors: list[Exception | None] = [None] * count
        self._started = [threading.Event() for _ in range(count)]
        self._client = client(server)
        self._threads = [
            threading.Thread(target=self._read, args=(i, tokens), daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        for started in self._started:
            assert started.wait(20), "a stream did not begin"

    def _read(self, number: int, tokens: int) -> None:
        try:
            for chunk in self._client.completions.create(
                model="nanoflow-demo",
                prompt=f"def f{number}(x):",
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                self.texts[number] += chunk.choices[0].text
                self._started[number].set()
        except Exception as error:
            self.errors[number] = error
        self._started[number].set()

    def join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), "a stream hangs"


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_flight_finish(
    start_live: Start, wait_until: Any, number: signal.Signals
) -> None:
    server = start_live()
    engine = server.engine_pid()
    streams = Streams(server, 20, tokens=60)
    server.process.send_signal(number)
    host, port = server.url.removeprefix("http://").split(":")

    def refused() -> bool:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(refused, 5, "still accepting")
    streams.join(30)
    assert streams.errors == [None] * 20
    assert all(streams.texts)
    assert server.process.wait(10) == 0
    wait_until(lambda: not exists(engine), 5, "the engine outlives the server")


def test_a_second_signal_stops_at_once(start_live: Start, wait_until: Any) -> None:
    server = start_live()
    engine = server.engine_pid()
    streams = Streams(server, 8, tokens=1000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 2
    streams.join(5)
    for error in streams.errors:
        assert isinstance(error, openai.APIError), error
        assert "shutting down" in str(error)
    wait_until(lambda: not exists(engine), 5, "the engine outlives the server")


def test_what_takes_longer_than_the_timeout_is_cut_off(start_live: Start) -> None:
    server = start_live("--shutdown-timeout", "0.3")
    streams = Streams(server, 8, tokens=1000)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    streams.join(5)
    assert all("shutting down" in str(error) for error in streams.errors)
    assert "8 requests are cut off" in server.log()
    assert server.log().count("outcome=abort_server") == 8


def test_a_killed_engine_ends_every_request_and_the_server(start_live: Start) -> None:
    server = start_live()
    streams = Streams(server, 8, tokens=1000)
    os.kill(server.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    health = None
    while time.monotonic() - killed < 5:
        try:
            health = httpx.get(f"{server.url}/health", timeout=2)
        except httpx.TransportError:
            break
        if health.status_code == 503:
            break
        time.sleep(0.02)
    assert health is not None
    assert health.status_code == 503
    assert health.json()["error"]["code"] == "engine_dead"
    streams.join(5)
    for error in streams.errors:
        assert isinstance(error, openai.APIError), error
        assert "engine process has stopped" in str(error)
    assert server.process.wait(10) == 1
    assert time.monotonic() - killed < 10
    assert "the engine process has stopped" in server.log()
    assert server.log().count("outcome=error") == 8


def test_the_engine_dies_with_a_killed_server(start_live: Start, wait_until: Any) -> None:
    server = start_live()
    Streams(server, 4, tokens=1000)
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait(5)
    wait_until(lambda: not exists(engine), 5, "the engine outlives the killed server")


def test_a_signal_during_the_start_ends_it(wait_until: Any) -> None:
    model = Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "nf_server.cli", "serve", str(model), "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children: list[int] = []

    def engine_started() -> bool:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            children.extend(map(int, (task / "children").read_text().split()))
        return bool(children)

    wait_until(engine_started, 20, "no engine process")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    wait_until(lambda: not any(map(exists, children)), 5, "the engine outlives the server")


def test_an_idle_server_stops_quickly_and_restarts_on_its_port(start_live: Start) -> None:
    first = start_live()
    port = first.url.rsplit(":", 1)[1]
    client(first).completions.create(model="nanoflow-demo", prompt="x", max_tokens=1)
    start = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(10) == 0
    assert time.monotonic() - start < 5
    assert "Traceback" not in first.log()
    second = start_live("--port", port)
    assert second.url == first.url
