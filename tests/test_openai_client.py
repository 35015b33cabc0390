"""The official `openai` client against `nanoflow serve`, over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = "nanoflow-demo"
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def banner() -> Iterator[str]:
    """What a server with the demo model printed when it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nf_server.cli", "serve", "models/nanoflow-demo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("curl "):
            break
    try:
        yield printed
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="module")
def base_url(banner: str) -> str:
    url = re.search(r"Ready on (http://\S+)", banner)
    assert url is not None, banner
    return f"{url[1]}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_the_printed_curl_line_is_answered(banner: str) -> None:
    (line,) = [line for line in banner.splitlines() if line.startswith("curl ")]
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    answer = json.loads(result.stdout)
    assert answer["model"] == MODEL
    assert re.search(r"\n +\w", answer["choices"][0]["text"]), answer  # an indented block


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "nanoflow"


def test_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text.strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


def test_streams(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=30, temperature=0)
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert len(chunks) > 5


def test_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Write Python."},
            {"role": "user", "content": [{"type": "text", "text": "def add(a, b):"}]},
        ],
        max_completion_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 16
    assert len(choice.logprobs.content[0].top_logprobs) == 3


def test_streams_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "class Stack:"}],
        max_tokens=24,
        temperature=0,
        stream=True,
        n=2,
    )
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    assert texts[0] == texts[1] != ""
    assert set(reasons) == {0, 1}
    assert set(reasons.values()) <= {"stop", "length"}


def test_extra_fields_of_vllm(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=12,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


async def test_many_at_once(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:

        async def text(number: int) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=f"x{number} = ", max_tokens=40, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(text(number) for number in range(32)))
    assert all(together)


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="gpt-4", prompt="x")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is") as too_long:
        client.completions.create(model=MODEL, prompt="x = 1\n" * 5000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as negative:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert negative.value.param == "temperature"
    assert negative.value.request_id
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert tools.value.code == "unsupported_parameter"


def test_raw_response_has_the_request_id(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="x", max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"


def test_an_abandoned_stream_leaves_the_server_well(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=800, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
