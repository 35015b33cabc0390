"""What surrounds every request: its id, and the answer to an unexpected exception."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nf_server.errors import error_response, internal_error

logger = logging.getLogger(__name__)

_ACCEPTABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestContext:
    """Pure ASGI middleware: every response carries `x-request-id`, no exception gets out.

    A client's own `x-request-id` is echoed when it is 1 to 128 printable ASCII characters;
    otherwise one is made. Handlers read it from `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id.decode("ascii")
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id.decode("ascii"))
            if started:
                raise
            await error_response(internal_error())(scope, receive, send_with_id)


def _request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"x-request-id" and _ACCEPTABLE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode("ascii")
