"""The engine process by itself, spoken to over its socket."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nf_runtime import EngineConfig, SamplingParams
from nf_runtime.engine_types import EngineInfo, EngineRequest, EngineStats, TokenOutput
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.messages import (
    info_from_json,
    output_from_json,
    output_to_json,
    pack,
    request_from_json,
    request_to_json,
    stats_from_json,
    stats_to_json,
)
from nf_scheduler import FinishReason, Ledger

MakeCheckpoint = Callable[..., Path]


class Child:
    """An engine process and our end of its socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(30)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nf_runtime.engine_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.PIPE,
                text=True,
            )
        assert self.process.stderr is not None
        self.stderr = self.process.stderr

    def send(self, **message: Any) -> None:
        self.socket.sendall(pack(message))

    def receive(self) -> dict[str, Any]:
        size = struct.unpack("<I", self._take(4))[0]
        message: dict[str, Any] = json.loads(self._take(size))
        return message

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the engine process hung up"
            data += part
        return data

    def end(self) -> int:
        """Wait for the process to end by itself; its exit status."""
        return self.process.wait(timeout=10)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.kill()
    child.process.wait()
    child.stderr.close()
    child.socket.close()


@pytest.fixture
def config(tiny_checkpoint: MakeCheckpoint) -> dict[str, Any]:
    path = str(tiny_checkpoint("llama3"))
    return EngineConfig(model=path, kv_cache_tokens=1024, max_model_len=256).to_dict()


def request(name: str, **fields: Any) -> dict[str, Any]:
    params = SamplingParams(**({"temperature": 0, "max_tokens": 5} | fields))
    return request_to_json(EngineRequest(name, [1, 2, 3], params, seed=7))


def test_a_life(child: Child, config: dict[str, Any]) -> None:
    child.send(config=config)
    assert child.receive()["ready"]["vocab_size"] == 200
    child.send(add=request("a"))
    outputs: list[TokenOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        message = child.receive()
        outputs += [output_from_json(value) for value in message["outputs"]]
    stats = stats_from_json(message["stats"])
    assert (stats.num_running, stats.kv_pages_used) == (0, 0)
    assert [output.request_id for output in outputs] == ["a"] * 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].ledger is not None

    child.send(add=request("b", max_tokens=None))
    child.send(add=request("b"))
    child.send(abort="never heard of")
    refused = None
    while refused is None:
        refused = child.receive().get("refused")
    assert refused["request_id"] == "b"
    assert not refused["overloaded"]
    assert "in use" in refused["message"]
    child.send(abort="b")
    child.send(stop=True)
    assert child.end() == 0


def test_a_name_can_be_used_again_right_after_an_abort(
    child: Child, config: dict[str, Any]
) -> None:
    """It is refused until the abort was told of, and taken from then on."""
    child.send(config=config)
    child.receive()
    for _ in range(20):
        child.send(add=request("a", max_tokens=200))
        child.send(abort="a")
        child.send(add=request("a", max_tokens=2))
        reasons: list[str] = []
        while "refused" not in reasons and "length" not in reasons:
            message = child.receive()
            reasons += ["refused"] if "refused" in message else []
            reasons += [value[2] for value in message.get("outputs", []) if value[2]]
        while "abort" not in reasons:
            reasons += [value[2] for value in child.receive()["outputs"] if value[2]]
    assert child.process.poll() is None


@pytest.mark.parametrize(
    ("when", "rest"),
    [
        ("before the config", b""),
        ("before the config", b"\x10"),
        ("while loading", b""),
        ("when ready", b"\xff\xff\x00\x00{"),
        ("at work", b""),
        ("at work", b"\x10"),
    ],
)
def test_it_ends_when_the_other_end_closes(
    child: Child, config: dict[str, Any], when: str, rest: bytes
) -> None:
    """At any time, and in the middle of a message as well."""
    if when != "before the config":
        child.send(config=config)
    if when in ("when ready", "at work"):
        child.receive()
    if when == "at work":
        child.send(add=request("a", max_tokens=None))
    child.socket.sendall(rest)
    child.socket.close()
    assert child.end() == 1


def test_what_cannot_be_loaded(child: Child, tmp_path: Path) -> None:
    child.send(config=EngineConfig(model=str(tmp_path)).to_dict())
    failed = child.receive()["failed"]
    assert failed["expected"] is True
    assert "config.json does not exist" in failed["message"]
    assert child.end() == 1
    assert "Traceback" not in child.stderr.read()


def test_a_defect_is_told_before_the_end(child: Child, config: dict[str, Any]) -> None:
    """A message that only a defect can make: the reason arrives, the details are on stderr."""
    child.send(config=config)
    child.receive()
    broken = request("a") | {"prompt_token_ids": ["not a number"]}
    child.send(add={**broken, "params": {}})
    failed = child.receive()["failed"]
    assert failed["expected"] is False
    assert "KeyError" in failed["message"]
    assert child.end() == 1
    assert "Traceback" in child.stderr.read()


def test_an_interrupt_is_left_to_the_parent(child: Child, config: dict[str, Any]) -> None:
    child.send(config=config)
    child.receive()
    os.kill(child.process.pid, signal.SIGINT)
    child.send(add=request("a", max_tokens=1))
    while not child.receive()["outputs"]:
        pass
    child.send(stop=True)
    assert child.end() == 0


def through_json(value: Any) -> Any:
    (size,) = struct.unpack("<I", pack(value)[:4])
    assert len(pack(value)) == size + 4
    return json.loads(pack(value)[4:])


def test_requests_survive_the_journey() -> None:
    params = SamplingParams(
        stop=["a", "🎉", '"\n'],
        stop_token_ids=[1],
        logit_bias={5: -1.5, 70: 100},
        temperature=1e-45,
        top_k=10**30,
        seed=2**64 - 1,
        max_tokens=None,
    )
    original = EngineRequest("näme", [0, 2**31 - 1], params, 2**64 - 1)
    assert request_from_json(through_json(request_to_json(original))) == original


@pytest.mark.parametrize(
    "output",
    [
        TokenOutput("a", 5),
        TokenOutput("a", 0, FinishReason.STOP, 0),
        TokenOutput(
            "a", None, FinishReason.ABORT, None, None, [], Ledger(arrival=1.5, prompt_tokens=3)
        ),
        TokenOutput(
            *("a", 5, None, None),
            RowLogprobs(5, -math.inf, 3, [1, 2], [-0.1, -math.inf]),
            [RowLogprobs(1, -2.0, 1, [], [])],
        ),
    ],
)
def test_outputs_survive_the_journey(output: TokenOutput) -> None:
    assert output_from_json(through_json(output_to_json(output))) == output


def test_stats_and_info_survive_the_journey() -> None:
    stats = EngineStats(
        *range(1, 12),
        {"host": 12},
        *(13, 14, 15),
        busy_seconds=1 / 3,
        last_step_time=1e9 + 0.1,
        overlap_steps={"nanoflow": {"planned": 16, "reference": 17}},
        overlap_gain={"nanoflow": 1.125},
    )
    assert (stats.num_restoring, stats.queued_prompt_tokens, stats.tenants) == (3, 4, 5)
    assert stats_from_json(through_json(stats_to_json(stats))) == stats
    info = {
        "model": "m",
        "dtype": "float32",
        "device": "cpu",
        "vocab_size": 10,
        "max_model_len": 5,
        "num_pages": 1,
        "page_size": 16,
        "eos_token_ids": (1, 2),
        "weight_bytes": 2**40,
        "startup_seconds": {"import": 0.5},
        "overlap": "auto, plans",
    }
    assert info_from_json(through_json(info)) == EngineInfo(**info)  # type: ignore[arg-type]
