"""`nanoflow serve`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nf_server.commands.failure import fail
from nf_server.logs import configure_logging
from nf_server.settings import ServerSettings
from nf_server.sockets import AddressError, bind_socket


def run(
    engine_options: dict[str, Any],
    *,
    host: str,
    port: int,
    served_model_names: list[str],
    use_generation_config: bool,
    shutdown_timeout: float,
    log_level: str,
) -> int:
    """Serve a model until stopped; the exit code of the process."""
    configure_logging(log_level)
    try:
        sock = bind_socket(host, port)
    except AddressError as error:
        fail(error)
    # The imports take seconds, and come after what can be wrong without them.
    from nf_runtime import EngineConfig, NanoFlowError
    from nf_server.lifecycle import ServeOptions, serve

    names = served_model_names or default_model_names(engine_options["model"])
    try:
        options = ServeOptions(
            engine=EngineConfig(**engine_options),
            settings=ServerSettings(
                model_names=tuple(names), use_generation_config=use_generation_config
            ),
            shutdown_timeout=shutdown_timeout,
        )
        with asyncio.Runner(loop_factory=fast_loop_factory()) as runner:
            return runner.run(serve(options, sock))
    except (AddressError, NanoFlowError) as error:
        fail(error)


def default_model_names(model: str) -> list[str]:
    """A local model answers to its folder's name and to the path as given; a hub id to itself."""
    if not os.path.isdir(model):
        return [model]
    name = Path(model).resolve().name
    return [name] if name == model else [name, model]


def fast_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The event loop of uvloop where that is installed; None means asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
