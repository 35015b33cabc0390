"""Answers of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nf_runtime import ChoiceDelta, RequestStream
from nf_server.render.head import AnswerHead, ChoiceText
from nf_server.render.logprobs import CompletionLogprobs, prompt_logprobs
from nf_server.sse import DONE, END, event, json_bytes

Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """What of a completion is shown.

    Attributes:
        num_choices: Choices per prompt.
        echo: The text of every prompt, to stand before its choices; None without `echo`.
        logprobs: Whether log probabilities are listed.
        decode: Text of one token id.
        prompt_logprobs: Whether those of the prompt are listed in a field of their own.
    """

    num_choices: int
    echo: list[str] | None
    logprobs: bool
    decode: Decode
    prompt_logprobs: bool = False


class CompletionStream:
    """Frames of a streamed completion.

    Args:
        head: Identity of the answer.
        streams: The engine's streams, one per prompt.
        shape: What is shown.
        usage: The usage so far; None when the client did not ask for usage.
        continuous: Put the usage into every chunk.
    """

    def __init__(
        self,
        head: AnswerHead,
        streams: list[RequestStream],
        shape: CompletionShape,
        *,
        usage: Callable[[], dict[str, Any]] | None = None,
        continuous: bool = False,
    ) -> None:
        self._head = head
        self._streams = streams
        self._shape = shape
        self._usage = usage
        self._continuous = continuous
        total = len(streams) * shape.num_choices
        opening = head.open_chunk()
        self._opening = [opening + b'{"index":%d,"text":' % i for i in range(total)]
        self._quiet_end = b"]" + (b"" if usage is None else b',"usage":null') + b"}" + END
        self._after_text = b',"logprobs":null,"finish_reason":null}' + self._quiet_end
        self._logprobs = [CompletionLogprobs() for _ in range(total)]
        self._echo_due = [shape.echo is not None] * total

    def start(self) -> bytes:
        """The first frames: none, because a prompt's log probabilities come with its tokens."""
        return b""

    def frames(self, choice: int, delta: ChoiceDelta) -> bytes:
        """The frame of what has arrived for `choice`; empty when there is nothing to show."""
        echo = self._take_echo(choice)
        listed = self._shape.logprobs and bool(delta.token_ids)
        if not (delta.text or delta.finish_reason or echo or listed):
            return b""
        out = echo + self._opening[choice] + json_bytes(delta.text)
        if delta.finish_reason is None and not listed and not self._continuous:
            return out + self._after_text
        logprobs = None
        if listed:
            logprobs = self._logprobs[choice].render(
                delta.token_ids, delta.logprobs or [], self._shape.decode
            )
        out += b',"logprobs":' + json_bytes(logprobs)
        return out + b',"finish_reason":' + json_bytes(delta.finish_reason) + b"}" + self._end()

    def finish(self) -> bytes:
        """The last frames."""
        if self._usage is None:
            return DONE
        return event({**self._head.fields(), "choices": [], "usage": self._usage()}) + DONE

    def _take_echo(self, choice: int) -> bytes:
        if not self._echo_due[choice] or self._shape.echo is None:
            return b""
        self._echo_due[choice] = False
        prompt = choice // self._shape.num_choices
        stream = self._streams[prompt]
        logprobs = None
        if self._shape.logprobs:
            logprobs = self._logprobs[choice].render(
                stream.prompt_token_ids, stream.prompt_logprobs or [], self._shape.decode
            )
        out = self._opening[choice] + json_bytes(self._shape.echo[prompt])
        out += b',"logprobs":' + json_bytes(logprobs) + b',"finish_reason":null}'
        return out + self._end()

    def _end(self) -> bytes:
        if self._continuous and self._usage is not None:
            return b'],"usage":' + json_bytes(self._usage()) + b"}" + END
        return self._quiet_end


class CompletionAnswer:
    """The body of a completion that is not streamed."""

    def __init__(
        self, head: AnswerHead, streams: list[RequestStream], shape: CompletionShape
    ) -> None:
        self._head = head
        self._streams = streams
        self._shape = shape
        self._choices = [ChoiceText() for _ in range(len(streams) * shape.num_choices)]

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        """Take in what has arrived for `choice`."""
        self._choices[choice].add(delta)

    def body(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(index) for index in range(len(self._choices))]
        return {**self._head.fields(), "choices": choices, "usage": usage}

    def _choice(self, index: int) -> dict[str, Any]:
        choice, shape = self._choices[index], self._shape
        prompt = index // shape.num_choices
        stream = self._streams[prompt]
        token_ids, entries, text = choice.token_ids, choice.logprobs, choice.text
        if shape.echo is not None:
            token_ids = [*stream.prompt_token_ids, *token_ids]
            entries = [*(stream.prompt_logprobs or []), *entries]
            text = shape.echo[prompt] + text
        answer: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": CompletionLogprobs().render(token_ids, entries, shape.decode)
            if shape.logprobs
            else None,
            "finish_reason": choice.finish_reason,
        }
        if shape.prompt_logprobs:
            answer["prompt_logprobs"] = prompt_logprobs(stream.prompt_logprobs or [])
        return answer
