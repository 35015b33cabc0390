"""Framing of server-sent events.

Frames are bytes joined from parts that are rendered once per request; per token only its text is
encoded. See `nf_server.render` for the JSON inside.
"""

from __future__ import annotations

import json
from typing import Any

from nf_server.errors import ApiError, error_bytes

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
END = b"\n\n"
DATA = b"data: "

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """`value` as compact UTF-8 JSON; fast for a plain string."""
    return _encode(value).encode("utf-8")


def event(value: Any) -> bytes:
    """One `data:` frame with `value` as JSON."""
    return DATA + json_bytes(value) + END


def error_event(error: ApiError) -> bytes:
    """The frames that end a stream which failed after its HTTP status was sent."""
    return DATA + error_bytes(error) + END + DONE
