"""How an answer leaves: as one JSON body, or as a stream of server-sent events."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nf_runtime import ChoiceDelta
from nf_server import sse
from nf_server.errors import ApiError, internal_error
from nf_server.generation import ClientGone, Generation

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499


class StreamRenderer(Protocol):
    """Makes the frames of a stream."""

    def start(self) -> bytes:
        """Frames that go out with the first ones."""
        ...

    def frames(self, choice: int, delta: ChoiceDelta) -> bytes:
        """Frames of what has arrived for a choice."""
        ...

    def finish(self) -> bytes:
        """The last frames."""
        ...


class AnswerRenderer(Protocol):
    """Makes the body of an answer that is not streamed."""

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        """Take in what has arrived for a choice."""
        ...

    def body(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        ...


async def json_answer(
    generation: Generation,
    answer: AnswerRenderer,
    request: Request,
    headers: dict[str, str],
) -> Response:
    """Run `generation` to its end and answer with one JSON body."""

    async def collect() -> None:
        async for base, deltas in generation.deltas():
            for delta in deltas:
                answer.add(base + delta.index, delta)

    try:
        await generation.run(collect(), request.receive)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    body = sse.json_bytes(answer.body(generation.usage()))
    return Response(body, headers=headers, media_type="application/json")


class EventStream(Response):
    """Streams `generation`: whatever has arrived goes out at once, in one write.

    Nothing is held back to be sent together. When the client or this process is slower than the
    engine, the engine's stream joins what has arrived meanwhile.
    """

    def __init__(
        self,
        generation: Generation,
        renderer: StreamRenderer,
        headers: dict[str, str],
        ping_seconds: float,
    ) -> None:
        super().__init__(headers={**sse.HEADERS, **headers})
        del self.headers["content-length"]
        self._generation = generation
        self._renderer = renderer
        self._ping_seconds = ping_seconds
        self._quiet = True
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it is complete or the client has left."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )

        async def ping() -> None:
            if self._quiet and not self._sending:
                await send({"type": "http.response.body", "body": sse.PING, "more_body": True})
            self._quiet = True

        last = b""
        try:
            await self._generation.run(
                self._pump(send),
                receive,
                on_silence=ping,
                silence_seconds=self._ping_seconds,
            )
            last = self._renderer.finish()
        except ClientGone:
            return
        except ApiError as error:
            last = sse.error_event(error)
        except Exception:
            logger.exception("stream of request %s failed", scope["state"]["request_id"])
            last = sse.error_event(internal_error())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, send: Send) -> None:
        frames = self._renderer.frames
        out = self._renderer.start()
        async for base, deltas in self._generation.deltas():
            for delta in deltas:
                out += frames(base + delta.index, delta)
            if out:
                self._quiet = False
                self._sending = True
                await send({"type": "http.response.body", "body": out, "more_body": True})
                self._sending = False
                out = b""
