"""Log probabilities in the shapes of the two endpoints.

The engine gives, per token, a dict of token id to `Logprob` with the token itself first and then
the most probable ones in descending order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nf_runtime import Logprob

TokenLogprobs = dict[int, Logprob]

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI does the same."""


def chat_logprobs(entries: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer, with the `top` most probable tokens each."""
    content = []
    for entry in entries:
        sampled = next(iter(entry.values()))
        best = sorted(entry.values(), key=lambda item: item.rank)[:top]
        content.append({**_chat_token(sampled), "top_logprobs": [_chat_token(b) for b in best]})
    return {"content": content, "refusal": None}


def _chat_token(item: Logprob) -> dict[str, Any]:
    return {
        "token": item.decoded_token,
        "logprob": _finite(item.logprob),
        "bytes": list(item.decoded_token.encode("utf-8", "replace")),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of a completion; remembers the offset from chunk to chunk."""

    def __init__(self) -> None:
        self._offset = 0

    def render(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        decode: Callable[[int], str],
    ) -> dict[str, Any]:
        """The next tokens.

        Args:
            token_ids: The tokens, prompt tokens included when they are echoed.
            entries: Their log probabilities; None for the first token of a prompt.
            decode: Text of a token that has no log probabilities.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            if entry is None:
                text = decode(token_id)
                logprobs.append(None)
                top.append(None)
            else:
                text = entry[token_id].decoded_token
                logprobs.append(_finite(entry[token_id].logprob))
                # Two ids may have one text: the first, which is the sampled one, wins.
                by_text: dict[str, float] = {}
                for item in entry.values():
                    by_text.setdefault(item.decoded_token, _finite(item.logprob))
                top.append(by_text)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None],
) -> list[dict[str, dict[str, Any]] | None]:
    """`choices[].prompt_logprobs`, an extension: per prompt token an object by token id."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(item.logprob),
                "rank": item.rank,
                "decoded_token": item.decoded_token,
            }
            for token_id, item in entry.items()
        }
        for entry in entries
    ]


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST  # NaN, too, is no JSON
