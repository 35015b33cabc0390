"""One API request inside the engine: its streams, its record, its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from nf_kvcache.tier import Tier
from nf_runtime import (
    ChoiceDelta,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestStream,
)
from nf_server.errors import (
    ApiError,
    deadline_exceeded,
    engine_unavailable,
    overloaded,
    server_stopping,
)
from nf_server.metrics import ServerMetrics
from nf_server.request_log import Outcome, RequestRecord
from nf_server.sampling import from_invalid_request

Result = TypeVar("Result")
Deltas = list[ChoiceDelta]


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Generation:
    """The streams of one API request, one per prompt, each with `num_choices` choices.

    Choices are numbered over all prompts: choice j of prompt i is `i * num_choices + j`.

    Args:
        streams: Streams that the engine has admitted; at least one.
        num_choices: Choices per prompt.
        record: The account of the request.
        metrics: Where tokens and the end of the request are counted.
        on_end: Called once, when the request is out of the engine.
    """

    def __init__(
        self,
        streams: list[RequestStream],
        num_choices: int,
        record: RequestRecord,
        metrics: ServerMetrics,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.streams = streams
        self.num_choices = num_choices
        self.record = record
        self._metrics = metrics
        self._on_end = on_end
        self._worker: asyncio.Future[Any] | None = None
        self._stopping = False
        self._outputs = [0] * (len(streams) * num_choices)
        self._outcome = Outcome.STOP
        record.prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams)
        metrics.prompt_tokens += record.prompt_tokens

    async def deltas(self) -> AsyncGenerator[tuple[int, Deltas], None]:
        """What the engine produces, as (number of the prompt's first choice, deltas).

        Raises:
            ApiError: the engine has died, or has refused or aborted the request, or it has run out
                of time without a token.
        """
        try:
            if len(self.streams) == 1:
                async for deltas in self.streams[0]:
                    self._count(0, deltas)
                    yield 0, deltas
            else:
                async with aclosing(_merged(self.streams, self.num_choices)) as merged:
                    async for base, deltas in merged:
                        self._count(base, deltas)
                        yield base, deltas
        except EngineDeadError:
            raise engine_unavailable() from None
        except InvalidRequestError as error:
            raise from_invalid_request(error) from None
        except OverloadedError as error:
            raise overloaded(error) from None

    def _count(self, base: int, deltas: Deltas) -> None:
        for delta in deltas:
            tokens = len(delta.token_ids)
            if tokens and self.record.first_token is None:
                self.record.first_token = time.monotonic()
            self._outputs[base + delta.index] += tokens
            self._metrics.generation_tokens += tokens
            if delta.finish_reason is None:
                continue
            if delta.finish_reason == "abort":
                raise server_stopping()
            if delta.finish_reason == "timeout":
                if not self._outputs[base + delta.index]:
                    raise deadline_exceeded()
                # To a client, an answer that ran out of time is one that was cut off.
                delta.finish_reason = "length"
                self._outcome = Outcome.TIMEOUT
            elif delta.finish_reason == "length" and self._outcome is not Outcome.TIMEOUT:
                self._outcome = Outcome.LENGTH

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, as far as the generation has come."""
        prompt = self.record.prompt_tokens
        completion = sum(stream.usage.completion_tokens for stream in self.streams)
        by_tier = [stream.usage.cached_tokens_by_tier for stream in self.streams]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(stream.usage.cached_tokens for stream in self.streams),
                "nanoflow_cached_tokens_by_tier": {
                    tier.label: sum(tokens.get(tier.label, 0) for tokens in by_tier)
                    for tier in Tier
                },
            },
        }

    def stop(self) -> None:
        """Cut the request off, because the server stops; its client gets an error."""
        self._stopping = True
        if self._worker is not None:
            self._worker.cancel()

    async def run(
        self,
        work: Coroutine[Any, Any, Result],
        receive: Receive,
        *,
        on_silence: Callable[[], Awaitable[None]] | None = None,
        silence_seconds: float = 15.0,
    ) -> Result:
        """Run `work`, which consumes `deltas()`, for as long as the client is there.

        When it returns or raises, the request is out of the engine, logged and counted.

        Args:
            work: What produces the answer.
            receive: The connection's ASGI receive, to see the client leave.
            on_silence: Called after every `silence_seconds`.
            silence_seconds: See `on_silence`.

        Raises:
            ClientGone: The client has left.
            ApiError: The engine has died, or the server stops.
        """
        worker: asyncio.Future[Result] = asyncio.ensure_future(work)
        self._worker = worker
        watcher = asyncio.ensure_future(_disconnected(receive))
        outcome = Outcome.ERROR
        if self._stopping:
            worker.cancel()
        try:
            while not worker.done():
                await asyncio.wait(
                    (worker, watcher),
                    timeout=silence_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if watcher.done() and not worker.done():
                    outcome = Outcome.ABORT_CLIENT
                    raise ClientGone
                if on_silence is not None and not worker.done():
                    await on_silence()
            if worker.cancelled() and self._stopping:
                raise server_stopping()
            result = worker.result()
            outcome = self._outcome
            return result
        except asyncio.CancelledError:
            outcome = Outcome.ABORT_SERVER
            raise
        except ApiError as error:
            if error.code == "server_shutdown":
                outcome = Outcome.ABORT_SERVER
            elif error.code == "deadline_exceeded":
                outcome = Outcome.TIMEOUT
            elif error.code == "queue_full":
                outcome = Outcome.QUEUE_FULL
            elif error.status < 500:
                outcome = Outcome.REJECTED
            raise
        finally:
            worker.cancel()
            watcher.cancel()
            await asyncio.wait((worker, watcher))
            await self._close(outcome)

    async def _close(self, outcome: Outcome) -> None:
        for stream in self.streams:
            await stream.aclose()
        record = self.record
        record.output_tokens = sum(self._outputs)
        record.longest_output = max(self._outputs)
        record.cached_tokens = sum(stream.usage.cached_tokens for stream in self.streams)
        record.read_ledgers([ledger for stream in self.streams for ledger in stream.ledger])
        record.end(outcome)
        record.log()
        self._metrics.finished(record)
        self._on_end(self)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merged(
    streams: list[RequestStream], num_choices: int
) -> AsyncGenerator[tuple[int, Deltas], None]:
    """The deltas of several streams as they arrive; bounded by one delta list per stream."""
    queue: asyncio.Queue[tuple[int, Deltas] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(base: int, stream: RequestStream) -> None:
        try:
            async for deltas in stream:
                await queue.put((base, deltas))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(i * num_choices, s)) for i, s in enumerate(streams)]
    open_streams = len(pumps)
    try:
        while open_streams:
            item = await queue.get()
            if item is None:
                open_streams -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.wait(pumps)
