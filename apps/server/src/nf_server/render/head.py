"""What every chunk and body of one answer has in common."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from nf_runtime import ChoiceDelta
from nf_server.sse import DATA, json_bytes


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """Identity of an answer.

    Attributes:
        id: The completion id, e.g. "chatcmpl-…".
        object: OpenAI's object type.
        model: The name under which the client asked for the model.
        created: Unix time in whole seconds.
    """

    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """The head as the first fields of a JSON object."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
        }

    def open_chunk(self) -> bytes:
        """A chunk up to where its choices begin."""
        return DATA + json_bytes(self.fields())[:-1] + b',"choices":['


@dataclass(slots=True)
class ChoiceText:
    """One choice of an answer that is not streamed, as far as it has come."""

    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append what has arrived."""
        self.parts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)
