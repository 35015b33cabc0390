"""Sentences about fields of `EngineConfig`, for users of the command line."""

from __future__ import annotations

import re
from dataclasses import fields

_WORDS = {"model", "device", "tokenizer", "seed", "policy", "overlap"}
"""Fields that are words of a sentence, too."""


def as_flags(text: str) -> str:
    """A sentence by the names of the command line: `--kv-device-bytes` for kv_device_bytes."""
    from nf_runtime import EngineConfig

    names = [field.name for field in fields(EngineConfig) if field.name not in _WORDS]
    return re.sub(
        rf"\b({'|'.join(names)})\b", lambda found: "--" + found[0].replace("_", "-"), text
    )
