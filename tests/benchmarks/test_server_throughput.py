"""What HTTP costs: 32 streams against the offline API, and the CPU time of the API process."""

import contextlib
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nf_runtime import LLM, SamplingParams

STREAMS = 32
PROMPT_TOKENS = 16
ROUNDS = 3

LEAST_SHARE_OF_OFFLINE = 0.85
MOST_CPU_MICROSECONDS_PER_TOKEN = 50.0
LEAST_FRAMES_PER_TOKEN = 0.9


@dataclass
class Server:
    """A `nanoflow serve` process, and a client that costs as little as possible."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def stream(self, prompts: list[list[int]], tokens: int) -> bytes:
        """Stream all prompts at once to their ends; gives what was received, in some order."""
        selector = selectors.DefaultSelector()
        for prompt in prompts:
            body = json.dumps(
                {
                    "prompt": prompt,
                    "max_tokens": tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                }
            ).encode()
            connection = socket.create_connection((self.host, self.port))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: benchmark\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            selector.register(connection, selectors.EVENT_READ)
        received = []
        while selector.get_map():
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)
                received.append(data)
                if not data or data.endswith(b"0\r\n\r\n"):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
        return b"".join(received)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics") as response:
            text = response.read().decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "nf_server.cli", "serve", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout:
            if ready := re.search(r"Ready on http://(.+):(\d+)", line):
                yield Server(process, ready[1], int(ready[2]))
                break
        else:
            pytest.fail("the server did not start")
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def random_prompts(vocab_size: int) -> list[list[int]]:
    """Prompts that share no prefix."""
    ids = np.random.default_rng(0).integers(1, vocab_size, (STREAMS, PROMPT_TOKENS))
    return ids.tolist()


def test_streaming_over_http_against_offline(benchmark: object, llama_300m_dir: Path) -> None:
    """Interleaved in one run: offline, 32 streams, offline, and so on."""
    tokens = 48
    options = {
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "max_num_seqs": STREAMS,
        "kv_cache_tokens": 16384,
    }
    llm = LLM(str(llama_300m_dir), **options)
    prompts = random_prompts(llm.engine.info.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {"offline": [], "http": []}

    def offline() -> None:
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds["offline"].append(time.perf_counter() - started)

    def http() -> None:
        started = time.perf_counter()
        answers = server.stream(prompts, tokens)
        seconds["http"].append(time.perf_counter() - started)
        assert answers.count(b'"finish_reason":"length"') == STREAMS

    command_line = ["--load-format", "dummy", "--no-enable-prefix-caching"]
    command_line += ["--max-num-seqs", str(STREAMS), "--kv-cache-tokens", "16384"]
    with serving(llama_300m_dir, *command_line) as server:
        offline()
        http()
        seconds = {"offline": [], "http": []}  # the first of each was to warm up
        benchmark.pedantic(http, setup=offline, rounds=ROUNDS)
    total = STREAMS * tokens
    rates = {name: total / float(np.median(values)) for name, values in seconds.items()}
    share = rates["http"] / rates["offline"]
    benchmark.extra_info.update(
        {
            "offline tokens/s": round(rates["offline"], 1),
            "http tokens/s": round(rates["http"], 1),
            "share": round(share, 3),
            "at least": LEAST_SHARE_OF_OFFLINE,
        }
    )
    assert share >= LEAST_SHARE_OF_OFFLINE


def test_cpu_of_the_api_process_per_token(benchmark: object, demo_model_dir: Path) -> None:
    """The demo model, so that tokens come as fast as they ever do."""
    tokens = 400
    vocab_size = json.loads((demo_model_dir / "config.json").read_text())["vocab_size"]
    prompts = random_prompts(vocab_size)
    frames = 0

    def http() -> None:
        nonlocal frames
        frames += server.stream(prompts, tokens).count(b"data: {")

    with serving(demo_model_dir, "--no-enable-prefix-caching") as server:
        http()
        frames = 0
        cpu = server.metric("process_cpu_seconds_total")
        generated = server.metric("nanoflow_generation_tokens_total")
        started = time.perf_counter()
        benchmark.pedantic(http, rounds=ROUNDS)
        elapsed = time.perf_counter() - started
        cpu = server.metric("process_cpu_seconds_total") - cpu
        generated = server.metric("nanoflow_generation_tokens_total") - generated
    assert generated == ROUNDS * STREAMS * tokens
    microseconds = cpu / generated * 1e6
    benchmark.extra_info.update(
        {
            "CPU us/token": round(microseconds, 1),
            "at most": MOST_CPU_MICROSECONDS_PER_TOKEN,
            "frames/token": round(frames / generated, 3),
            "tokens/s": round(generated / elapsed, 1),
            "cores": os.cpu_count(),
        }
    )
    assert microseconds <= MOST_CPU_MICROSECONDS_PER_TOKEN
    assert frames / generated >= LEAST_FRAMES_PER_TOKEN, "tokens are held back"
