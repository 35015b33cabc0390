"""The engine as the routes see it: admission, tokenising, and the requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nf_runtime import (
    AsyncEngine,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestOptions,
    RequestStream,
    SamplingParams,
)
from nf_server.errors import (
    bad_request,
    engine_unavailable,
    model_not_found,
    overloaded,
    server_stopping,
)
from nf_server.generation import Generation
from nf_server.metrics import ServerMetrics
from nf_server.protocol.fields import FieldCheck
from nf_server.request_log import RequestRecord
from nf_server.sampling import effective_defaults, from_invalid_request
from nf_server.settings import ServerSettings

LONG_TEXT_CHARS = 8192
"""Requests with more text are tokenised in a thread, so that open streams go on meanwhile."""

Tokens = TypeVar("Tokens", list[int], list[list[int]])


class InferenceService:
    """What the routes share; one per application."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = ServerMetrics(engine)
        self.fields = FieldCheck()
        self.defaults = effective_defaults(
            engine.generation_defaults, settings.use_generation_config
        )
        self._active: set[Generation] = set()
        self._stopping = False
        self._tokenise = ThreadPoolExecutor(2, thread_name_prefix="tokenise")

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        info = self.engine.info
        return min(info.max_model_len, info.num_pages * info.page_size)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer under; the primary one when the client sent none.

        Raises:
            ApiError: 404 when no such model is served.
        """
        if name is None:
            return self.settings.model_name
        if name not in self.settings.model_names:
            raise model_not_found(name, self.settings.model_names)
        return name

    def check_load(self) -> None:
        """Refuse a request that there is no room for, before any work goes into it.

        Raises:
            ApiError: 429.
        """
        try:
            self.engine.check_load()
        except OverloadedError as error:
            raise overloaded(error) from None

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Each of `texts` as token ids."""
        encode = self.engine.tokenizer.encode
        return await self._tokenising(
            lambda: [encode(text, add_special_tokens=add_special_tokens) for text in texts],
            num_chars=sum(map(len, texts)),
        )

    async def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, kwargs: dict[str, Any]
    ) -> list[int]:
        """`messages` as token ids, through the model's chat template.

        Raises:
            ApiError: 400 when the model has no template, or the template refuses the messages.
        """
        tokenizer = self.engine.tokenizer
        if not tokenizer.has_chat_template:
            raise bad_request(
                f"The model {self.settings.model_name!r} has no chat template; "
                "use /v1/completions.",
                param="messages",
                code="chat_template_missing",
            )

        def apply() -> list[int]:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **kwargs
            )

        try:
            return await self._tokenising(apply, num_chars=len(repr(messages)))
        except InvalidRequestError as error:
            raise from_invalid_request(error) from None

    async def _tokenising(self, work: Callable[[], Tokens], *, num_chars: int) -> Tokens:
        """Do `work` on `num_chars` characters: here when they are few, else in a thread."""
        if num_chars <= LONG_TEXT_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._tokenise, work)

    def admit(
        self,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        record: RequestRecord,
        *,
        options: RequestOptions,
    ) -> Generation:
        """Hand prompts to the engine: all of them or none.

        Args:
            prompts: Token ids, and how to go on.
            record: The account of the request.
            options: When and next to whom they run.

        Raises:
            ApiError: 400 when the engine refuses one; 429 when it has too many; 503 when it has
                died or the server stops.
        """
        if self._stopping:
            raise server_stopping()
        streams: list[RequestStream] = []
        try:
            for number, (token_ids, params) in enumerate(prompts):
                request_id = f"{record.completion_id}-{number}"
                stream = self.engine.submit(
                    token_ids, params, request_id=request_id, options=options
                )
                streams.append(stream)
        except InvalidRequestError as error:
            self._withdraw(streams)
            raise from_invalid_request(error) from None
        except OverloadedError as error:
            self._withdraw(streams)
            raise overloaded(error) from None
        except EngineDeadError:
            raise engine_unavailable() from None
        num_choices = prompts[0][1].n
        generation = Generation(streams, num_choices, record, self.metrics, self._active.discard)
        self._active.add(generation)
        return generation

    def _withdraw(self, streams: list[RequestStream]) -> None:
        for stream in streams:
            self.engine.abort(stream.request_id)

    @property
    def num_active(self) -> int:
        """API requests that are being answered."""
        return len(self._active)

    def stop_all(self) -> None:
        """Cut off every request in flight with an error, and admit no further ones."""
        self._stopping = True
        for generation in list(self._active):
            generation.stop()

    def close(self) -> None:
        """Release the tokeniser's threads."""
        self._tokenise.shutdown(wait=False, cancel_futures=True)
