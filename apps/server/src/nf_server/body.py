"""Reading a JSON request body, with every way in which it can be bad answered as HTTP 4xx."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from nf_server.errors import ApiError, bad_request, clip


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body of `request` as a JSON object.

    Raises:
        ApiError: 400 when the content type is not JSON, or the body is empty, not UTF-8, not JSON
            (a lone surrogate and nesting beyond 200 levels count as that) or not an object; 413
            when it is longer than `max_bytes`, judged by Content-Length before it is read.
    """
    _check_content_type(request.headers.get("content-type"))
    body = await _read(request, max_bytes)
    if not body.strip():
        raise bad_request("The request body is empty; expected a JSON object.", code="invalid_json")
    try:
        value = from_json(body)
    except ValueError as error:
        reason = clip(str(error), 150)
        raise bad_request(
            f"The request body is not valid JSON: {reason}.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise bad_request(
            f"The request body must be a JSON object, not {_json_type(value)}.", code="invalid_json"
        )
    return value


def _check_content_type(content_type: str | None) -> None:
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        got = f"not {clip(media_type, 80)!r}" if media_type else "but none was sent"
        raise bad_request(
            f"The content type must be 'application/json', {got}. "
            "Set the header 'Content-Type: application/json'.",
            code="unsupported_content_type",
        )


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise bad_request(
            "The connection closed before the body was complete.", code="invalid_json"
        ) from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is too large: the limit is {max_bytes} bytes.",
        code="request_too_large",
    )


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "a number"
