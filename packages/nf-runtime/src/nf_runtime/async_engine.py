"""The engine in a process of its own, for asyncio programs such as the server."""

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from nf_runtime.choice import Choice, ChoiceDelta, describe_logprobs
from nf_runtime.config import EngineConfig
from nf_runtime.engine_types import EngineInfo, EngineStats, RequestOptions, TokenOutput
from nf_runtime.errors import (
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
)
from nf_runtime.fan_out import fan_out
from nf_runtime.logprobs import Logprob
from nf_runtime.messages import (
    HEADER,
    info_from_json,
    output_from_json,
    pack,
    request_to_json,
    stats_from_json,
)
from nf_runtime.model_config import read_json
from nf_runtime.model_source import find_model
from nf_runtime.pipeline.plan import PlanError
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.tokenizer import Tokenizer
from nf_runtime.validation import validate_request
from nf_scheduler import Ledger

_log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 10.0

# Sampling defaults that a model's generation_config.json may carry.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: Of the prompt.
        completion_tokens: Of all answers so far.
        cached_tokens: Of the prompt, found in the KV cache; known at the end.
        cached_tokens_by_tier: The same by where they were: `device`, `host`, `disk`.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_tokens_by_tier: Mapping[str, int]


class RequestStream:
    """The answers of one request as they grow: an asynchronous iterator of lists of deltas.

    What arrives between two reads is joined into one delta per answer: nothing waits for a slow
    reader, and a fast one gets every token as it comes.

    Attributes:
        request_id: Of the request.
        prompt_token_ids: Its prompt.
        prompt_logprobs: When wanted, from the first delta on; None for the first prompt token.
    """

    def __init__(
        self,
        engine: "AsyncEngine",
        request_id: str,
        prompt_token_ids: list[int],
        choices: list[Choice],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._engine = engine
        self._choices = choices
        self._unfinished = len(choices)
        self._pending: dict[int, ChoiceDelta] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far; exact once the stream has ended."""
        ledger = self._choices[0].ledger
        return Usage(
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=ledger.cached_tokens if ledger else 0,
            cached_tokens_by_tier=ledger.cached_tokens_by_tier if ledger else {},
        )

    @property
    def ledger(self) -> list[Ledger]:
        """The engine's account of every answer that it has finished.

        It may count a few more tokens of an answer that a stop string ended, which the engine made
        before it was told. They are in no text and in no `usage`.
        """
        return [choice.ledger for choice in self._choices if choice.ledger]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        """What has arrived since the last call, once there is something.

        Raises:
            EngineDeadError: The engine ended before the answers did.
            InvalidRequestError: The engine refused the request.
            OverloadedError: The engine has too many requests already.
            StopAsyncIteration: Every answer has finished.
        """
        while not self._pending:
            if self._error:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    async def aclose(self) -> None:
        """Abort whatever has not finished, as `AsyncEngine.abort`; harmless at the end."""
        self._engine.abort(self.request_id)

    def accept(self, choice: Choice, output: TokenOutput) -> None:
        """Take an output of the engine; for `AsyncEngine`."""
        if output.prompt_logprobs is not None:
            tokenizer = self._engine.tokenizer
            self.prompt_logprobs = [
                None,
                *(describe_logprobs(row, tokenizer) for row in output.prompt_logprobs),
            ]
        delta = choice.accept(output)
        known = self._pending.get(choice.index)
        if delta is not None and known is not None:
            known.join(delta)
        elif delta is not None:
            self._pending[choice.index] = delta
        if output.finish_reason is not None:
            self._unfinished -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error; for `AsyncEngine`."""
        if not all(choice.finished for choice in self._choices):
            self._error = error
        self._unfinished = 0
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """An engine in a child process. Made by `start`; to be used on one event loop.

    Attributes:
        config: How it was set up.
        info: What it runs.
        tokenizer: The model's.
        generation_defaults: Sampling parameters of the model's generation_config.json.
        stats: Where the engine stood after its last iteration, or at its start.
        dead_reason: Why the engine has ended; None while it lives.
    """

    def __init__(
        self,
        config: EngineConfig,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.config = config
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self.generation_defaults: dict[str, Any] = {}
        self.stats = EngineStats()
        self.dead_reason: str | None = None
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._dead = asyncio.Event()
        self._stopping = False
        self._live: dict[str, tuple[RequestStream, Choice]] = {}
        self._choice_names: dict[str, list[str]] = {}
        self._numbers = itertools.count()
        self._question_numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def start(cls, config: EngineConfig) -> "AsyncEngine":
        """Start the process and wait until the model is loaded.

        Raises:
            ModelLoadError: The model cannot be loaded; with the child's reason.
            EngineDeadError: The process ended for another reason.
        """
        path = await asyncio.to_thread(find_model, config.model)
        tokenizer_path = path
        if config.tokenizer is not None:
            tokenizer_path = await asyncio.to_thread(find_model, config.tokenizer)
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # not from the current directory, which may hold anybody's files
                    "-m",
                    "nf_runtime.engine_process",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except BaseException:
                writer.close()
                raise
        engine = cls(config, process, reader, writer)
        engine._send({"config": config.to_dict()})
        try:
            # The tokenizer loads while the child loads the weights.
            engine.tokenizer, ready = await asyncio.gather(
                asyncio.to_thread(Tokenizer, tokenizer_path), engine._ready
            )
            engine.info = info_from_json(ready)
            generation = path / "generation_config.json"
            values = read_json(generation) if generation.exists() else {}
            defaults = {n: values[n] for n in _DEFAULTS if values.get(n) is not None}
            try:
                SamplingParams(**defaults)
            except InvalidRequestError as error:
                raise ModelLoadError(f"{generation}: {error}") from error
        except BaseException:
            engine._kill()  # it may be in the middle of loading
            await engine.shutdown()
            raise
        engine.generation_defaults = defaults
        return engine

    @property
    def is_alive(self) -> bool:
        """Whether requests can be submitted."""
        return self.dead_reason is None

    @property
    def pid(self) -> int:
        """Process id of the engine process."""
        return self._process.pid

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        options: RequestOptions | None = None,
    ) -> RequestStream:
        """Send a request to the engine.

        Args:
            prompt_token_ids: At least one.
            params: How its tokens are chosen.
            request_id: Unique among live requests; made up when None.
            options: When and next to whom it runs.

        Raises:
            InvalidRequestError: The model cannot run it, or its id is in use.
            OverloadedError: There are too many requests already.
            EngineDeadError: The engine has ended.
        """
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)
        self.check_load(len(prompt_token_ids))
        validate_request(prompt_token_ids, params, self.info)
        number = next(self._numbers)
        request_id = request_id or f"request-{number}"
        if request_id in self._choice_names:
            raise InvalidRequestError(
                f"request_id {request_id!r} is in use; give every request its own",
                param="request_id",
            )
        choices = [
            Choice(index, prompt_token_ids, params, self.tokenizer) for index in range(params.n)
        ]
        stream = RequestStream(self, request_id, prompt_token_ids, choices)
        requests = fan_out(
            request_id,
            prompt_token_ids,
            params,
            options or RequestOptions(),
            engine_seed=self.config.seed,
            number=number,
        )
        self._choice_names[request_id] = [request.request_id for request in requests]
        for request, choice in zip(requests, choices, strict=True):
            self._live[request.request_id] = (stream, choice)
            self._send({"add": request_to_json(request)})
        return stream

    def check_load(self, prompt_tokens: int = 0) -> None:
        """Refuse at once what the engine has no room for in its queue, before work goes into it.

        The engine itself counts exactly; this is what is known here.

        Args:
            prompt_tokens: Length of the prompt, once it is known.

        Raises:
            OverloadedError: There are too many requests already.
        """
        most, stats = self.config.max_num_queued_reqs, self.stats
        if most is not None:
            room = most + self.config.max_num_seqs
            # Who waits for KV from a lower tier has left the queue.
            if stats.num_waiting - stats.num_restoring >= most or len(self._live) >= room:
                raise OverloadedError(
                    f"too many requests: {len(self._live)} are open, and max_num_queued_reqs is "
                    f"{most}"
                )
        most, queued = self.config.max_num_queued_tokens, stats.queued_prompt_tokens
        if most is not None and prompt_tokens and queued and queued + prompt_tokens > most:
            raise OverloadedError(
                f"too many requests: prompts of {queued} tokens are queued, this one has "
                f"{prompt_tokens}, and max_num_queued_tokens is {most}"
            )

    def abort(self, request_id: str) -> None:
        """End a request early; an unknown or finished one is left alone.

        Its stream ends with `finish_reason` abort once the engine has let go of it.
        """
        for name in self._choice_names.get(request_id, ()):
            self._send({"abort": name})

    async def timeline(self) -> dict[str, Any]:
        """The iterations that were timed lately, as a Chrome trace (`nf_runtime.chrome_trace`).

        Raises:
            EngineDeadError: The engine has ended.
        """
        trace: dict[str, Any] = await self._ask({"timeline": True})
        return trace

    async def set_overlap(self, overlap: str) -> None:
        """Run iterations by other plans, from the next one on; requests go on.

        Args:
            overlap: As `EngineConfig.overlap`.

        Raises:
            PlanError: It names no plan, or one that does not fit; then all stays as it was.
            EngineDeadError: The engine has ended.
        """
        await self._ask({"overlap": overlap})

    async def _ask(self, question: dict[str, Any]) -> Any:
        """Ask the engine something that it does between two iterations."""
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)
        number = next(self._question_numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        self._send({"ask": question | {"number": number}})
        try:
            return await answer
        finally:
            del self._questions[number]

    async def wait_dead(self) -> str:
        """Wait until the engine process has gone; gives the reason."""
        await self._dead.wait()
        return self.dead_reason or ""

    async def shutdown(self) -> None:
        """End the engine process; open requests end with an error."""
        self._stopping = True
        self._send({"stop": True})
        try:
            await asyncio.wait_for(self._process.wait(), _SHUTDOWN_SECONDS)
        except TimeoutError:
            self._kill()
        await self._receiver
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def _receive(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(HEADER.size)
                body = await self._reader.readexactly(*HEADER.unpack(header))
                self._handle(json.loads(body))
        except (asyncio.IncompleteReadError, OSError):
            status = await self._process.wait()
            self._die(self._describe_exit(status))
        except Exception as error:  # a defect; no stream must wait for ever because of it
            _log.exception("what the engine process sent cannot be handled")
            self._kill()
            self._die(f"{type(error).__name__}: {error}")

    def _handle(self, message: dict[str, Any]) -> None:
        if "outputs" in message:
            self.stats = stats_from_json(message["stats"])
            for value in message["outputs"]:
                self._deliver(output_from_json(value))
        elif "ready" in message:
            self.stats = stats_from_json(message["stats"])
            if not self._ready.done():  # as it is when starting was cancelled
                self._ready.set_result(message["ready"])
        elif "answer" in message:
            answer = message["answer"]
            question = self._questions.get(answer["number"])
            if question is not None and not question.done():
                if "error" in answer:
                    question.set_exception(PlanError(answer["error"]))
                else:
                    question.set_result(answer["value"])
        elif "refused" in message:
            refused = message["refused"]
            stream = self._forget(refused["request_id"])
            kind = OverloadedError if refused["overloaded"] else InvalidRequestError
            stream.fail(kind(refused["message"]))
            self.abort(stream.request_id)
        else:
            failed = message["failed"]
            self.dead_reason = failed["message"]
            if failed["expected"] and not self._ready.done():
                self._ready.set_exception(ModelLoadError(failed["message"]))

    def _deliver(self, output: TokenOutput) -> None:
        stream, choice = self._live[output.request_id]
        was_finished = choice.finished
        stream.accept(choice, output)
        if output.finish_reason is not None:
            self._forget(output.request_id)
        elif choice.finished and not was_finished:  # by a stop string, which only we see
            self._send({"abort": output.request_id})

    def _forget(self, name: str) -> RequestStream:
        """Drop an answer that the engine has done with; gives the stream it belongs to."""
        stream, _ = self._live.pop(name)
        names = self._choice_names[stream.request_id]
        names.remove(name)
        if not names:
            del self._choice_names[stream.request_id]
        return stream

    def _describe_exit(self, status: int) -> str:
        if self._stopping:
            return "the engine was shut down"
        if self.dead_reason is not None:
            return f"the engine failed: {self.dead_reason}"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine process {how}; see its messages above"

    def _die(self, reason: str) -> None:
        self.dead_reason = reason
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(reason))
            self._ready.exception()  # seen: nobody may be waiting any more
        for stream, _ in list(self._live.values()):
            stream.fail(EngineDeadError(reason))  # its own: raising an error adds to its traceback
        for question in self._questions.values():
            if not question.done():
                question.set_exception(EngineDeadError(reason))
        self._live.clear()
        self._choice_names.clear()
        self._dead.set()
