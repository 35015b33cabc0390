"""A server whose KV cache has tiers on the host and on an SSD is warm after it was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]

# About 150 tokens each; together more than the device has room for.
PROMPTS = [
    f"# Module {name}: " + f"def {name}_{{}}(a, b): return a + b * {number}\n" * 8
    for number, name in enumerate(("alpha", "beta", "gamma", "delta", "epsilon", "zeta"))
]


def complete(server: Any, prompt: str, **fields: Any) -> tuple[str, dict[str, int]]:
    """The answer, and cached tokens by tier."""
    response = httpx.post(
        f"{server.url}/v1/completions",
        json={"prompt": prompt, "max_tokens": 16, "temperature": 0} | fields,
        timeout=60,
    )
    assert response.status_code == 200, response.text
    body = response.json()
    details = body["usage"]["prompt_tokens_details"]
    by_tier: dict[str, int] = details["nanoflow_cached_tokens_by_tier"]
    assert sum(by_tier.values()) == details["cached_tokens"]
    return body["choices"][0]["text"], by_tier


def pages_on_disk(server: Any) -> float:
    value: float = server.metric('nanoflow_kv_pages{state="cached",tier="disk"}')
    return value


def test_warm_after_the_server_and_its_engine_were_killed(
    start_live: Start, tmp_path: Path, wait_until: Any
) -> None:
    plain = start_live()
    expected = [complete(plain, prompt)[0] for prompt in PROMPTS]
    plain.process.terminate()

    options = ["--kv-host-bytes", "64MiB", "--kv-ssd-dir", str(tmp_path / "kv")]
    options += ["--kv-ssd-max-bytes", "512MiB", "--kv-cache-tokens", "512"]
    options += ["--max-model-len", "512"]
    first = start_live(*options)
    for text, prompt in zip(expected, PROMPTS, strict=True):
        assert complete(first, prompt)[0] == text
    again = [complete(first, prompt) for prompt in PROMPTS]
    assert [text for text, _ in again] == expected
    assert sum(by_tier["host"] for _, by_tier in again) > 0
    assert first.metric('nanoflow_prefix_tokens_total{result="hit_host"}') > 0
    wait_until(
        lambda: (
            first.metric('nanoflow_kv_pages{state="used",tier="disk"}') == 0
            and pages_on_disk(first) > 40
        ),
        10,
        "the pages do not get to the disk",
    )
    stored = pages_on_disk(first)
    time.sleep(1)
    engine = first.engine_pid()
    for pid in (first.process.pid, engine):
        os.kill(pid, signal.SIGKILL)
    first.process.wait(10)

    second = start_live(*options)
    assert pages_on_disk(second) >= 0.9 * stored
    warm = [complete(second, prompt) for prompt in PROMPTS]
    assert [text for text, _ in warm] == expected
    assert all(by_tier["disk"] > 64 for _, by_tier in warm)
    assert second.metric("nanoflow_kv_damaged_pages_total") == 0


def test_salts_keep_tenants_apart(live: Any) -> None:
    prompt = "# what one tenant asks is nothing that another one may find out\n" * 4
    found = []
    for salt in ("a", "b", "a", None, None):
        fields = {} if salt is None else {"cache_salt": salt}
        found.append(complete(live, prompt, **fields)[1]["device"] > 0)
    assert found == [False, False, True, False, True]


@pytest.mark.parametrize("salt", [1, ["a"], {}])
def test_a_salt_is_a_string(live: Any, salt: Any, assert_openai_error: Any) -> None:
    body = {"prompt": "x", "cache_salt": salt}
    response = httpx.post(f"{live.url}/v1/completions", json=body)
    assert_openai_error(response, 400, "invalid_value", "cache_salt")
