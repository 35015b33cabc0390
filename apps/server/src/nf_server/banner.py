"""What `nanoflow serve` prints when it is ready."""

from __future__ import annotations

import json
import shlex
from typing import Any

from nf_runtime import EngineInfo
from nf_server import __version__
from nf_server.settings import ServerSettings

EXAMPLE_PROMPT = "def fibonacci(n):"


def ready_text(
    info: EngineInfo,
    settings: ServerSettings,
    defaults: dict[str, Any],
    url: str,
    total_seconds: float,
) -> str:
    """The text that says what is served, how long the start took, and how to try it.

    Args:
        info: What the engine runs; it has the phases of the start.
        settings: The HTTP side's.
        defaults: Sampling defaults that come from the model.
        url: Where a client on this machine reaches the server.
        total_seconds: The whole start; phases of the two processes overlap in it.
    """
    tokens = info.num_pages * info.page_size
    names = ", ".join(name for name in settings.model_names if name != info.model)
    lines = [
        f"NanoFlow {__version__} serves {info.model}" + (f" as {names}" if names else ""),
        f"  {info.dtype} on {info.device}, context {info.max_model_len} tokens, "
        f"KV cache {tokens} tokens in {info.num_pages} pages",
        f"  Overlap: {info.overlap}",
        "",
        "Start",
        *_phase_table({**info.startup_seconds, "until ready": total_seconds}),
        "",
        f"Sampling defaults: {_defaults_text(settings, defaults)}",
        f"Ready on {url} (Ctrl+C stops it). Try:",
        "",
        curl_line(url, settings.model_name),
        "",
    ]
    return "\n".join(lines)


def curl_line(url: str, model: str) -> str:
    """One line for a shell that asks `model` for a completion."""
    body = {"model": model, "prompt": EXAMPLE_PROMPT, "max_tokens": 64, "temperature": 0}
    return (
        f"curl {url}/v1/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def _phase_table(phases: dict[str, float]) -> list[str]:
    width = max((len(phase) for phase in phases), default=0)
    return [f"  {phase:<{width}}  {seconds:8.2f} s" for phase, seconds in phases.items()]


def _defaults_text(settings: ServerSettings, defaults: dict[str, Any]) -> str:
    if not settings.use_generation_config:
        return "the API's own (--generation-config vllm)"
    if not defaults:
        return "the API's own (the model's generation_config.json sets none)"
    values = ", ".join(f"{name}={value}" for name, value in defaults.items())
    return f"{values} (from generation_config.json; --generation-config vllm ignores it)"
