"""The one error shape of every route: `{"error": {"message", "type", "param", "code"}}`.

The wording of messages is part of the API, because clients classify errors by keywords: a message
about the server (5xx) says "server" or "unavailable" and never "invalid", "format" or "key".
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

MAX_REPORTED_ERRORS = 10
MAX_ERROR_CHARS = 200
MAX_MESSAGE_CHARS = 2000


class ApiError(Exception):
    """An error that is answered to the client in the OpenAI shape.

    Attributes:
        status: HTTP status.
        message: A sentence for the client: what was wrong, and what was expected.
        code: Machine-readable reason, e.g. "model_not_found".
        type: OpenAI's error type, e.g. "invalid_request_error".
        param: The request field that the error is about, if one is.
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type
        self.param = param
        self.headers = headers or {}


def error_object(error: ApiError) -> dict[str, Any]:
    """The JSON object for `error`; the only place where the shape is written down."""
    return {
        "error": {
            "message": clip(error.message, MAX_MESSAGE_CHARS),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_bytes(error: ApiError) -> bytes:
    """`error_object` as ASCII JSON, safe for any text that a client may have sent."""
    return json.dumps(error_object(error)).encode("ascii")


def error_response(error: ApiError) -> Response:
    """The HTTP response for `error`."""
    return Response(
        error_bytes(error),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


def clip(text: str, limit: int) -> str:
    """`text`, cut to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """HTTP 400: the request itself is wrong."""
    return ApiError(400, message, code=code, param=param)


def context_length_exceeded(
    max_model_len: int, prompt_tokens: int, max_tokens: int | None, param: str
) -> ApiError:
    """HTTP 400: prompt plus requested tokens do not fit. Clients match on the wording."""
    asked = f"your prompt has {prompt_tokens} tokens"
    if max_tokens is None:
        asked += ", which leaves no room for an answer"
    else:
        asked += f" and you asked for up to {max_tokens} more"
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens. However, {asked}. "
        "Shorten the prompt or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


def model_not_found(name: str, known: tuple[str, ...]) -> ApiError:
    """HTTP 404: the request names a model that is not served here."""
    names = ", ".join(repr(n) for n in known)
    return ApiError(
        404,
        f"The model {clip(name, MAX_ERROR_CHARS)!r} does not exist here. Served: {names}.",
        code="model_not_found",
        type="not_found_error",
        param="model",
    )


def overloaded(error: Exception) -> ApiError:
    """HTTP 429: too many requests wait already. Clients retry by the wording and the header."""
    return ApiError(
        429,
        clip(f"Rate limit: {error}. Try again in a moment.", MAX_MESSAGE_CHARS),
        code="queue_full",
        type="overloaded_error",
        headers={"retry-after": "1"},
    )


def deadline_exceeded() -> ApiError:
    """HTTP 408: the request ran out of the time that it gave itself, without a token."""
    return ApiError(
        408,
        "No token was generated within 'timeout_seconds'; the request waited all that time.",
        code="deadline_exceeded",
        param="timeout_seconds",
    )


def engine_unavailable() -> ApiError:
    """HTTP 503: the engine process has gone."""
    return ApiError(
        503,
        "The engine process has stopped and the server is unavailable until it is restarted.",
        code="engine_dead",
        type="server_error",
        headers={"retry-after": "5"},
    )


def server_stopping() -> ApiError:
    """HTTP 503: the server is shutting down and cuts the request off."""
    return ApiError(
        503,
        "The server is shutting down and did not finish this request. It is unavailable now.",
        code="server_shutdown",
        type="server_error",
        headers={"retry-after": "5"},
    )


def internal_error() -> ApiError:
    """HTTP 500: a fault of the server; details are in its log."""
    return ApiError(
        500,
        "The server failed on this request; its log has the details under the request's id.",
        code="internal_error",
        type="server_error",
        headers={"x-should-retry": "false"},
    )


def validation_error(error: ValidationError) -> ApiError:
    """HTTP 400 for a request body that failed validation; bounded whatever the body was."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for problem in problems[:MAX_REPORTED_ERRORS]:
        where = ".".join(str(part) for part in problem["loc"]) or "body"
        what = problem["msg"].removeprefix("Value error, ")
        lines.append(clip(f"{clip(where, 100)}: {what}", MAX_ERROR_CHARS))
    if len(problems) > MAX_REPORTED_ERRORS:
        lines.append(f"and {len(problems) - MAX_REPORTED_ERRORS} more")
    first = problems[0]
    return bad_request(
        "; ".join(lines),
        param=clip(".".join(str(part) for part in first["loc"]), 100) or None,
        code="missing_required_parameter" if first["type"] == "missing" else "invalid_value",
    )


async def _on_api_error(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, ApiError):
        raise TypeError(f"expected an ApiError, got {type(exc).__name__}")
    return error_response(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise TypeError(f"expected an HTTPException, got {type(exc).__name__}")
    path = clip(request.url.path, MAX_ERROR_CHARS)
    if exc.status_code == 404:
        message, code, kind = f"There is no route {path!r}.", "not_found", "not_found_error"
    elif exc.status_code == 405:
        message = f"The route {path!r} does not take {clip(request.method, 20)}."
        code, kind = "method_not_allowed", "invalid_request_error"
    else:
        message, code, kind = str(exc.detail), f"http_{exc.status_code}", "invalid_request_error"
    headers = dict(exc.headers) if exc.headers else None
    return error_response(ApiError(exc.status_code, message, code=code, type=kind, headers=headers))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected error of `app` in the one shape; see also `RequestContext`."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
