"""How an engine process starts, fails, dies and ends; it never outlives its parent."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nf_runtime import AsyncEngine, EngineConfig, EngineDeadError, ModelLoadError, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MakeCheckpoint = Callable[..., Path]
DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
ENDLESS = SamplingParams(temperature=0, max_tokens=None)


@pytest.fixture
def model(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a random model, which can talk for long; with the demo model's tokenizer."""
    vocab_size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    source = tiny_checkpoint("llama3", vocab_size=vocab_size, max_position_embeddings=8192)
    path = Path(shutil.copytree(source, tmp_path / "model"))
    for file in DEMO.glob("tokenizer*.json"):
        shutil.copy(file, path)
    return path


def config_of(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **({"kv_cache_tokens": 16384} | options))


@pytest_asyncio.fixture
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config_of(model))
    yield engine
    await engine.shutdown()
    assert is_gone(engine.pid)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if somebody has yet to take notice of it or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def engine_processes() -> list[int]:
    """Engine processes that this process has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [
        int(pid)
        for pid in children
        if b"nf_runtime.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


async def read_all(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_killed_engine_fails_its_streams(engine: AsyncEngine) -> None:
    streams = [engine.submit([i], ENDLESS) for i in range(3)]
    for stream in streams:
        await anext(stream)
    readers = [asyncio.create_task(read_all(stream)) for stream in streams[:2]]
    await asyncio.sleep(0)
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        reason = await engine.wait_dead()
    assert "killed by signal 9" in reason
    assert engine.dead_reason == reason
    assert not engine.is_alive
    for reader in (*readers, read_all(streams[2])):
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            await reader
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        engine.submit([1], ENDLESS)
    await streams[0].aclose()
    engine.abort("anything")
    await engine.shutdown()


async def test_what_arrived_before_a_death_is_given_first(engine: AsyncEngine) -> None:
    stream = engine.submit([1], ENDLESS)
    done = engine.submit([1], SamplingParams(max_tokens=3))
    while stream.usage.completion_tokens < 10:
        await asyncio.sleep(0.005)
    os.kill(engine.pid, signal.SIGKILL)
    await engine.wait_dead()
    (delta,) = await anext(stream)
    assert len(delta.token_ids) == stream.usage.completion_tokens >= 10
    with pytest.raises(EngineDeadError):
        await anext(stream)
    (finished,) = await anext(done)
    assert finished.finish_reason == "length"
    with pytest.raises(StopAsyncIteration):
        await anext(done)


async def test_a_defect_of_the_receiver_fails_the_streams(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for what cannot be read any more."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of this test")

    monkeypatch.setattr(engine, "_deliver", fail)
    stream = engine.submit([1], ENDLESS)
    async with asyncio.timeout(5):
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: of this test"):
            await anext(stream)
        await engine.wait_dead()


async def test_shutdown_ends_everything(engine: AsyncEngine) -> None:
    stream = engine.submit([1], ENDLESS)
    await anext(stream)
    started = time.monotonic()
    await asyncio.gather(engine.shutdown(), engine.shutdown())
    await engine.shutdown()
    assert time.monotonic() - started < 5
    assert is_gone(engine.pid)
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        await read_all(stream)
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        engine.submit([1], ENDLESS)
    assert await engine.wait_dead() == "the engine was shut down"


async def test_ctrl_c_is_the_parents_business(engine: AsyncEngine) -> None:
    """The signal reaches every process of a terminal; the engine goes on until told to stop."""
    os.kill(engine.pid, signal.SIGINT)
    stream = engine.submit([1], SamplingParams(max_tokens=3))
    await read_all(stream)
    assert engine.is_alive


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; supported"),
        ({"hidden_size": 128}, r"model\.safetensors: tensor .*config\.json makes it"),
        ("model.safetensors", r"model\.safetensors is truncated or corrupt"),
        ("tokenizer.json", "no usable tokenizer"),
    ],
)
async def test_a_model_that_does_not_load(
    model: Path, damage: str | dict[str, Any], message: str
) -> None:
    """The child's reason comes back, and soon; nothing is left behind."""
    if isinstance(damage, str):
        (model / damage).write_bytes((model / damage).read_bytes()[:1000])
    else:
        values = json.loads((model / "config.json").read_text()) | damage
        (model / "config.json").write_text(json.dumps(values))
    async with asyncio.timeout(30):
        with pytest.raises(ModelLoadError, match=message):
            await AsyncEngine.start(config_of(model))
    assert engine_processes() == []


async def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("/no/such/folder", "nobody/nothing"):
        with pytest.raises(ModelLoadError, match=f"'{name}' is no directory here"):
            await AsyncEngine.start(EngineConfig(model=name))
    assert engine_processes() == []


async def test_an_engine_that_dies_while_loading(model: Path) -> None:
    starting = asyncio.create_task(AsyncEngine.start(config_of(model)))
    while not engine_processes():
        await asyncio.sleep(0.01)
    os.kill(engine_processes()[0], signal.SIGKILL)
    async with asyncio.timeout(20):
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            await starting
    assert engine_processes() == []


async def test_starting_can_be_cancelled(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    starting = asyncio.create_task(AsyncEngine.start(config_of(model)))
    while not engine_processes():
        await asyncio.sleep(0.01)
    starting.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert engine_processes() == []
    assert not caplog.records


async def test_defaults_are_the_models_own(model: Path, tmp_path: Path) -> None:
    """Also when the tokenizer comes from elsewhere, where there may be defaults as well."""
    defaults = {"temperature": 0.25, "top_k": 7, "top_p": None, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    engine = await AsyncEngine.start(config_of(model, tokenizer=str(DEMO)))
    assert engine.generation_defaults == {"temperature": 0.25, "top_k": 7}
    await engine.shutdown()


PARENT = """
import asyncio, sys
from nf_runtime import AsyncEngine, EngineConfig, SamplingParams

async def main():
    engine = await AsyncEngine.start(EngineConfig(model=sys.argv[1], kv_cache_tokens=16384))
    stream = engine.submit([1], SamplingParams(temperature=0, max_tokens=None))
    await anext(stream)
    print(engine.pid, flush=True)
    async for _ in stream:
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_engine_ends_with_its_parent(model: Path, kind: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.send_signal(kind)
        wait_until(lambda: is_gone(pid), 5)
