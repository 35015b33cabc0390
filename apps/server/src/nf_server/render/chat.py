"""Answers of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nf_runtime import ChoiceDelta, RequestStream
from nf_server.render.head import AnswerHead, ChoiceText
from nf_server.render.logprobs import chat_logprobs, prompt_logprobs
from nf_server.sse import DONE, END, event, json_bytes


class ChatStream:
    """Frames of a streamed chat answer.

    Args:
        head: Identity of the answer.
        num_choices: Number of choices.
        top_logprobs: Tokens to list per token; None for no log probabilities.
        usage: The usage so far; None when the client did not ask for usage.
        continuous: Put the usage into every chunk.
    """

    def __init__(
        self,
        head: AnswerHead,
        num_choices: int,
        *,
        top_logprobs: int | None = None,
        usage: Callable[[], dict[str, Any]] | None = None,
        continuous: bool = False,
    ) -> None:
        self._head = head
        self._top_logprobs = top_logprobs
        self._usage = usage
        self._continuous = continuous
        self._quiet_end = b"]" + (b"" if usage is None else b',"usage":null') + b"}" + END
        opening = head.open_chunk()
        self._opening = [opening + b'{"index":%d,"delta":' % i for i in range(num_choices)]
        self._content = [o + b'{"content":' for o in self._opening]
        self._after_text = b'},"logprobs":null,"finish_reason":null}' + self._quiet_end

    def start(self) -> bytes:
        """The first frames: the role of every choice."""
        role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(opening + role + self._end() for opening in self._opening)

    def frames(self, choice: int, delta: ChoiceDelta) -> bytes:
        """The frames of what has arrived for `choice`; empty when there is nothing to show."""
        out = b""
        if self._top_logprobs is not None and delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._top_logprobs)
            out = self._content[choice] + json_bytes(delta.text) + b'},"logprobs":'
            out += json_bytes(logprobs) + b',"finish_reason":null}' + self._end()
        elif delta.text:
            out = self._content[choice] + json_bytes(delta.text)
            if self._continuous:
                out += b'},"logprobs":null,"finish_reason":null}' + self._end()
            else:
                out += self._after_text
        if delta.finish_reason is not None:
            out += self._opening[choice] + b'{},"logprobs":null,"finish_reason":'
            out += json_bytes(delta.finish_reason) + b"}" + self._end()
        return out

    def finish(self) -> bytes:
        """The last frames."""
        if self._usage is None:
            return DONE
        return event({**self._head.fields(), "choices": [], "usage": self._usage()}) + DONE

    def _end(self) -> bytes:
        if self._continuous and self._usage is not None:
            return b'],"usage":' + json_bytes(self._usage()) + b"}" + END
        return self._quiet_end


class ChatAnswer:
    """The body of a chat answer that is not streamed."""

    def __init__(
        self,
        head: AnswerHead,
        streams: list[RequestStream],
        num_choices: int,
        *,
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> None:
        self._head = head
        self._stream = streams[0]
        self._top_logprobs = top_logprobs
        self._prompt_logprobs = prompt_logprobs
        self._choices = [ChoiceText() for _ in range(num_choices)]

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        """Take in what has arrived for `choice`."""
        self._choices[choice].add(delta)

    def body(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = None
            if self._top_logprobs is not None:
                logprobs = chat_logprobs(choice.logprobs, self._top_logprobs)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                }
            )
        answer = {**self._head.fields(), "choices": choices, "usage": usage}
        if self._prompt_logprobs:
            answer["prompt_logprobs"] = prompt_logprobs(self._stream.prompt_logprobs or [])
        return answer
