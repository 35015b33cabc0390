"""The life of a server process: start the engine, serve, and stop for one of four reasons."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass

import uvicorn

from nf_runtime import AsyncEngine, EngineConfig
from nf_server.app import create_app
from nf_server.banner import ready_text
from nf_server.service import InferenceService
from nf_server.settings import ServerSettings
from nf_server.sockets import base_url, listen

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
_DEAD_ENGINE_LINGER_SECONDS = 1.0
_ERROR_FRAMES_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the life of the process is configured with.

    Attributes:
        engine: The engine's configuration.
        settings: The HTTP side's.
        shutdown_timeout: Seconds that requests in flight get to finish after the first signal.
    """

    engine: EngineConfig
    settings: ServerSettings
    shutdown_timeout: float


class _Signals:
    """Counts SIGINT and SIGTERM: the first asks to stop, the second to stop now."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.stop_now = asyncio.Event()
        self.last: signal.Signals | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        caught = (signal.SIGINT, signal.SIGTERM)
        for number in caught:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self.last = number
        if self.stop.is_set():
            self.stop_now.set()
        self.stop.set()

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that died of the last signal."""
        return 128 + (self.last or signal.SIGTERM)


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(options: ServeOptions, sock: socket.socket) -> int:
    """Serve until a signal, or the engine's death, ends it.

    Args:
        options: See `ServeOptions`.
        sock: A bound socket; it is closed at the end.

    Returns:
        The exit code of the process: 0 after a signal when every request in flight was finished,
        128 + signal when some were cut off, 1 when the engine died.

    Raises:
        ModelLoadError: The model cannot be loaded.
        AddressError: The port was taken while the model was loaded.
    """
    started = time.monotonic()
    signals = _Signals()
    with signals.caught(), contextlib.closing(sock):
        engine = await _start_engine(options.engine, signals)
        try:
            return await _serve_engine(engine, options, sock, signals, started)
        finally:
            await _shut_down(engine, signals)


async def _start_engine(config: EngineConfig, signals: _Signals) -> AsyncEngine:
    """The started engine; a signal that comes first ends the process."""
    starting = asyncio.ensure_future(AsyncEngine.start(config))
    await _first_of(starting, signals.stop.wait())
    if not starting.done():
        # Threads are busy importing and loading, and there is nothing to clean up: the engine's
        # process ends with this one.
        sys.stderr.flush()
        os._exit(signals.exit_code)
    return starting.result()


async def _serve_engine(
    engine: AsyncEngine,
    options: ServeOptions,
    sock: socket.socket,
    signals: _Signals,
    started: float,
) -> int:
    app = create_app(engine, options.settings)
    service: InferenceService = app.state.service
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        ws="none",
    )
    server = _HttpServer(config)
    listen(sock)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    seconds = time.monotonic() - started
    text = ready_text(engine.info, options.settings, service.defaults, base_url(sock), seconds)
    print(text, flush=True)
    dead = asyncio.ensure_future(engine.wait_dead())
    try:
        await _first_of(serving, dead, signals.stop.wait())
        if signals.stop.is_set():
            code = await _drain(server, serving, service, options.shutdown_timeout, signals)
            return 1 if dead.done() else code
        if dead.done():
            logger.critical("the engine process has stopped: %s", dead.result())
            # Requests in flight get their error from the engine's streams; new ones get a 503.
            await asyncio.sleep(_DEAD_ENGINE_LINGER_SECONDS)
            await _end(server, serving, service)
            return 1
        serving.result()
        return 1
    finally:
        dead.cancel()
        service.close()


async def _drain(
    server: _HttpServer,
    serving: asyncio.Future[None],
    service: InferenceService,
    timeout: float,
    signals: _Signals,
) -> int:
    """Stop accepting, let requests in flight finish, cut off what is left."""
    logger.info(
        "stopping: %d requests in flight get up to %g s; a second signal stops at once",
        service.num_active,
        timeout,
    )
    server.should_exit = True
    await _first_of(serving, signals.stop_now.wait(), timeout=timeout)
    if serving.done():
        return 0
    logger.warning("stopping now: %d requests are cut off", service.num_active)
    await _end(server, serving, service)
    return signals.exit_code


async def _end(
    server: _HttpServer, serving: asyncio.Future[None], service: InferenceService
) -> None:
    """Cut off every request with an error and stop the HTTP server within seconds."""
    service.stop_all()
    server.should_exit = True
    await asyncio.wait((serving,), timeout=_ERROR_FRAMES_SECONDS)
    server.force_exit = True
    await asyncio.wait((serving,), timeout=_ERROR_FRAMES_SECONDS)


async def _shut_down(engine: AsyncEngine, signals: _Signals) -> None:
    shutting_down = asyncio.ensure_future(engine.shutdown())
    await _first_of(shutting_down, signals.stop_now.wait())
    if shutting_down.done():
        shutting_down.result()
    else:
        # The engine's process ends with this one.
        shutting_down.cancel()


async def _first_of(*awaitables: Awaitable[object], timeout: float | None = None) -> None:
    """Wait for the first of `awaitables`; coroutines among them are cancelled afterwards."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for awaitable, future in zip(awaitables, futures, strict=True):
        if future is not awaitable:
            future.cancel()
