"""Request fields that are known but not supported, and fields that need nothing done.

A field that would change the answer is never ignored silently: it is refused with HTTP 400, unless
its value asks for what happens anyway. Fields nobody has heard of are accepted, logged once per
name, and named in the response header `x-nanoflow-warnings`.
"""

from __future__ import annotations

import logging
from typing import Any

from nf_server.errors import bad_request, clip

logger = logging.getLogger(__name__)

_MAX_NAMES_LOGGED = 1000
_MAX_NAMES_IN_HEADER = 16
_MAX_NAME_CHARS = 64

# Fields without influence on the answer: accounting and routing hints of other services.
WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)

# Field -> the values that ask for nothing beyond what is done anyway (None always does).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class FieldCheck:
    """Sorts the fields that a request model does not declare; remembers which names it logged."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def unknown(self, extra: dict[str, Any]) -> list[str]:
        """Names in `extra` that nobody knows, each logged the first time it is seen.

        Raises:
            ApiError: 400 for a field that is known and not supported.
        """
        names = []
        for name, value in extra.items():
            if name in UNSUPPORTED:
                _refuse_unless_neutral(name, value)
            elif name not in WITHOUT_EFFECT:
                names.append(name)
        for name in names:
            shown = clip(name, _MAX_NAME_CHARS)
            if shown not in self._logged and len(self._logged) < _MAX_NAMES_LOGGED:
                self._logged.add(shown)
                logger.warning("ignored unknown request field %r", shown)
        return names


def warnings_header(unknown: list[str]) -> dict[str, str]:
    """The response header that names ignored fields; empty when there are none."""
    if not unknown:
        return {}
    shown = [
        clip(name, _MAX_NAME_CHARS).encode("ascii", "replace").decode("ascii")
        for name in unknown[:_MAX_NAMES_IN_HEADER]
    ]
    printable = ["".join(c if " " <= c <= "~" else "?" for c in name) for name in shown]
    if len(unknown) > len(shown):
        printable.append(f"and {len(unknown) - len(shown)} more")
    return {"x-nanoflow-warnings": "ignored unknown fields: " + ", ".join(printable)}


def _refuse_unless_neutral(name: str, value: Any) -> None:
    neutral = UNSUPPORTED[name]
    if value is None or value in neutral:
        return
    hint = f" Leave it out or send {neutral[0]!r}." if neutral else " Leave it out."
    raise bad_request(
        f"{name!r} is not supported by this server.{hint}",
        param=name,
        code="unsupported_parameter",
    )
