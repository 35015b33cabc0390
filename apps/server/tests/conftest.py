"""A scripted engine where timing and failure are controlled, the real one everywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from nf_kvcache.disk import DiskStats
from nf_kvcache.stats import LowerTierStats
from nf_runtime import ChoiceDelta, EngineDeadError, InvalidRequestError, SamplingParams
from nf_server import cli
from nf_server.app import create_app
from nf_server.service import InferenceService
from nf_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[3]
DEMO_MODEL = ROOT / "models" / "nanoflow-demo"

Step = list[ChoiceDelta] | Exception | float

LOWER_TIERS = LowerTierStats(
    host_pages_total=9,
    host_pages_used=2,
    host_pages_cached=3,
    host_pages_free=4,
    host_evictions=5,
    host_placement="anywhere",
    downloaded_bytes=6,
    download_seconds=0.25,
    uploaded_bytes=7,
    upload_seconds=0.5,
    skipped_pages=8,
    unwritten_pages=3,
    restores_under_way=1,
    restores_cut=2,
    disk=DiskStats(
        io="threads",
        is_direct=True,
        is_degraded=True,
        slots_total=30,
        pages_stored=20,
        pages_queued=3,
        pages_found=0,
        pages_written=21,
        pages_read=4,
        bytes_written=2100,
        bytes_read=400,
        write_seconds=0.75,
        read_seconds=0.125,
        commits=1,
        evictions=11,
        pages_damaged=12,
        writes_dropped={"queue full": 13},
        writes_failed=14,
        errors={"ENOSPC": 15},
    ),
)


class ScriptedStream:
    """Plays a list of steps: deltas, seconds to wait, or an exception to raise."""

    def __init__(self, request_id: str, prompt: list[int], steps: list[Step]) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt
        self.prompt_logprobs = None
        self.usage = SimpleNamespace(
            prompt_tokens=len(prompt),
            completion_tokens=0,
            cached_tokens=0,
            cached_tokens_by_tier={},
        )
        self.ledger: list[Any] = []
        self.closed = False
        self._steps = iter(steps)

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, int | float):
                await asyncio.sleep(step)
                continue
            self.usage.completion_tokens += sum(len(delta.token_ids) for delta in step)
            return step
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


class ScriptedTokenizer:
    """One token per character; the chat template joins the contents."""

    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % 256 for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in ids)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        if kwargs.get("fail"):
            raise InvalidRequestError("roles must alternate", param="messages")
        return self.encode("\n".join(message["content"] or "" for message in messages))


@dataclass
class ScriptedEngine:
    """As much of `AsyncEngine` as the server uses, playing `script` for every request."""

    script: list[Step] = field(default_factory=list)
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    submitted: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)
    dead_reason: str | None = None

    def __post_init__(self) -> None:
        self.tokenizer = ScriptedTokenizer()
        self.ledger = [
            SimpleNamespace(arrival=1.0, first_scheduled=1.25, finished=1.5, preemptions=2)
        ]
        self.info = SimpleNamespace(
            model="/models/scripted",
            max_model_len=64,
            dtype="float32",
            device="cpu",
            vocab_size=256,
            num_pages=8,
            page_size=16,
            startup_seconds={"weights": 0.5, "total": 1.5},
            overlap="off: sequential",
        )
        self.stats = SimpleNamespace(
            num_running=1,
            num_waiting=2,
            num_restoring=1,
            queued_prompt_tokens=48,
            tenants=3,
            kv_pages_used=3,
            kv_pages_cached=1,
            kv_pages_total=8,
            preemptions=4,
            prefix_queried_tokens=32,
            prefix_hit_tokens=16,
            prefix_hit_tokens_by_tier={"device": 11, "host": 5},
            iterations_ahead=39,
            iterations=10,
            iteration_tokens=100,
            busy_seconds=1.5,
            last_step_time=1000.0,
            overlap_steps={"nanoflow": {"planned": 7}, "sequential": {"no_bucket": 2}},
            cuda_graph_steps=5,
            overlap_gain={"nanoflow": 1.25},
            lower_tiers=LOWER_TIERS,
        )

    @property
    def is_alive(self) -> bool:
        return self.dead_reason is None

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        options: Any = None,
    ) -> ScriptedStream:
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)
        self.submitted.append((prompt_token_ids, params))
        stream = ScriptedStream(request_id or "", prompt_token_ids, self.script)
        stream.ledger = self.ledger
        self.streams.append(stream)
        return stream

    def check_load(self) -> None:
        pass

    def abort(self, request_id: str) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A client of HTTP reads all certificates there are, which takes longer than most requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        yield


@dataclass
class ScriptedServer:
    """A server over a `ScriptedEngine`, listening on a real socket in a thread."""

    url: str
    engine: ScriptedEngine
    service: InferenceService
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def _serving(engine: ScriptedEngine, **settings: Any) -> Iterator[ScriptedServer]:
    app = create_app(
        engine,  # type: ignore[arg-type]
        ServerSettings(model_names=("scripted", "alias"), **settings),
    )
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, ws="none"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, 10, "the scripted server did not start")
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        yield ScriptedServer(url, engine, app.state.service, loops[0])
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a scripted server: `scripted(steps, **ServerSettings fields)`."""
    with contextlib.ExitStack() as stack:

        def start(script: list[Step] | None = None, **settings: Any) -> ScriptedServer:
            engine = ScriptedEngine(script=script or [])
            return stack.enter_context(_serving(engine, **settings))

        yield start


def wait_until(condition: Callable[[], Any], seconds: float, message: str) -> None:
    """Poll `condition` until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(message)
        time.sleep(0.005)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[[Callable[[], Any], float, str], None]:
    return wait_until


@pytest.fixture
def assert_openai_error() -> Callable[..., dict[str, Any]]:
    """The one assertion about errors, used over all routes."""

    def check(
        response: httpx.Response,
        status: int,
        code: str,
        param: str | None = ...,  # type: ignore[assignment]
    ) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"]
        body = response.json()
        assert set(body) == {"error"}
        error: dict[str, Any] = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert 0 < len(error["message"]) <= 2000
        types = {"invalid_request_error", "not_found_error", "server_error", "overloaded_error"}
        assert error["type"] in types
        assert error["code"] == code
        assert error["param"] is None or isinstance(error["param"], str)
        if param is not ...:
            assert error["param"] == param
        return error

    return check


@dataclass
class LiveServer:
    """A `nanoflow serve` process."""

    process: subprocess.Popen[str]
    url: str
    banner: str
    log_path: Path

    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def engine_pid(self) -> int:
        """The pid of the engine process: the child of the server that uses most memory."""
        children = child_pids(self.process.pid)
        return max(children, key=_resident_pages)

    def metric(self, name: str) -> float:
        """The value of a metric line, given with its labels."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")


def child_pids(pid: int) -> list[int]:
    """Direct children of a process."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return children


def _resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


@contextlib.contextmanager
def start_server(log_path: Path, *arguments: str) -> Iterator[LiveServer]:
    """Run `nanoflow serve` on the demo model and a free port until it is ready."""
    command = [sys.executable, "-m", "nf_server.cli", "serve", str(DEMO_MODEL), "--port", "0"]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        banner = ""
        for line in process.stdout:
            banner += line
            if line.startswith("curl "):
                break
        url = re.search(r"Ready on (http://\S+)", banner)
        assert url is not None, banner + log_path.read_text()
        server = LiveServer(process, url[1], banner, log_path)
        wait_until(lambda: _answers(server.url), 10, "the server does not answer")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with the demo model for all tests that do not harm it."""
    with start_server(tmp_path_factory.mktemp("live") / "log.txt") as server:
        yield server


@pytest.fixture(scope="module")
def live_without_lag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The same, but its engine waits for each iteration before it forms the next."""
    log = tmp_path_factory.mktemp("live_without_lag") / "log.txt"
    with start_server(log, "--no-async-scheduling") as server:
        yield server


@pytest.fixture
def start_live(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server of one's own, to be harmed: `start_live(*arguments)`."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> LiveServer:
            return stack.enter_context(start_server(tmp_path / "log.txt", *arguments))

        yield start


def run_nanoflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has torch already."""
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(
        arguments, result.exit_code, stdout=result.stdout, stderr=result.stderr
    )


def _only_error_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "nanoflow: error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


_known_peaks: dict[Any, Any] = {}


@pytest.fixture
def nanoflow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in this process: `nanoflow(*arguments)`.

    What the machine can do at most is measured by the first command that asks, as always, and not
    again by each that follows, where it would take most of the time.
    """
    from nf_runtime import engine

    measure = engine.measure_peaks

    def measure_once(operations: Any, stream: Any, *, dtype: Any, device: Any) -> Any:
        if (dtype, device) not in _known_peaks:
            _known_peaks[dtype, device] = measure(operations, stream, dtype=dtype, device=device)
        return _known_peaks[dtype, device]

    monkeypatch.setattr(engine, "measure_peaks", measure_once)
    return run_nanoflow


@pytest.fixture
def only_error_line() -> Callable[..., str]:
    """The one line of a command that has failed as commands should."""
    return _only_error_line


@pytest.fixture
def measured_plans() -> Callable[[Path], None]:
    """Write a plan set that `start_live` finds for the demo model: `measured_plans(directory)`."""

    def write(directory: Path) -> None:
        import torch

        from nf_runtime.device import name_device
        from nf_runtime.models import decoder_graph, read_config
        from nf_runtime.pipeline.plan import Bucket, PlanSet
        from nf_runtime.pipeline.plan_store import file_name, model_fingerprint
        from nf_runtime.pipeline.templates import nanoflow, sequential

        model = read_config(DEMO_MODEL)
        graph = decoder_graph(model)
        brand, _, _ = name_device(torch.device("cpu")).rpartition(",")
        threads = os.environ.get("OMP_NUM_THREADS", "1")  # as in `start_server`
        plan_set = PlanSet(
            model=model_fingerprint(model),
            device=f"{brand}, {threads} threads",
            dtype="bfloat16",
            plans=(nanoflow(graph), sequential(graph)),
            buckets=(
                Bucket(tokens=(2, 64), plan="nanoflow", gain=1.5),
                Bucket(tokens=(1, 1), plan="sequential"),
            ),
        )
        plan_set.save(directory / file_name(plan_set))

    return write
