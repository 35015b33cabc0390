"""The request of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nf_server.protocol.common import MAX_LOGPROBS, GenerationRequest

MAX_MESSAGES = 4096

RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Names that mean something to the code around the template: a client must not set them. Above all
a client's own template is refused, because it is a program that may run for ever."""


def _content_text(value: Any) -> Any:
    """Content parts as one text; strings and None pass through."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or an array of content parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"only content parts of type 'text' are supported, got {kind!r:.40}")
        if not isinstance(part.get("text"), str):
            raise ValueError("a content part of type 'text' needs a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One message; what is not declared here reaches the chat template unchanged."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_content_text)] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        extra = self.model_extra or {}
        if self.content is None and not (extra.get("tool_calls") or extra.get("function_call")):
            raise ValueError("a message without tool_calls needs 'content'")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template gets it."""
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": self.content}


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("only allowed together with 'logprobs': true")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_template_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        reserved = RESERVED_TEMPLATE_KWARGS.intersection(value or ())
        if reserved:
            raise ValueError(f"{', '.join(sorted(reserved))} cannot be set by a request")
        return value

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; `max_completion_tokens` wins over `max_tokens`."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def token_limit_field(self) -> str:
        """The name of the field that `token_limit` comes from."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
