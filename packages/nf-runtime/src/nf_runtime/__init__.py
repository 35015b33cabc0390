"""Runs language models: `LLM` in this process, `AsyncEngine` in a process of its own.

`nf_runtime.graph` and the model families are data and import without torch; the names below are
loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from nf_runtime.config import EngineConfig
from nf_runtime.errors import (
    ContextLengthExceededError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    NanoFlowError,
    OverloadedError,
)
from nf_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nf_runtime.async_engine import AsyncEngine, RequestStream
    from nf_runtime.choice import ChoiceDelta
    from nf_runtime.engine_types import EngineInfo, EngineStats, RequestOptions
    from nf_runtime.llm import LLM
    from nf_runtime.logprobs import Logprob
    from nf_runtime.outputs import CompletionOutput, RequestOutput
    from nf_runtime.tokenizer import Tokenizer

__version__ = "0.1.0"

_LATE = {
    "LLM": "nf_runtime.llm",
    "AsyncEngine": "nf_runtime.async_engine",
    "ChoiceDelta": "nf_runtime.choice",
    "CompletionOutput": "nf_runtime.outputs",
    "EngineInfo": "nf_runtime.engine_types",
    "EngineStats": "nf_runtime.engine_types",
    "Logprob": "nf_runtime.logprobs",
    "RequestOptions": "nf_runtime.engine_types",
    "RequestOutput": "nf_runtime.outputs",
    "RequestStream": "nf_runtime.async_engine",
    "Tokenizer": "nf_runtime.tokenizer",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "ChoiceDelta",
    "CompletionOutput",
    "ContextLengthExceededError",
    "EngineConfig",
    "EngineDeadError",
    "EngineInfo",
    "EngineStats",
    "InvalidRequestError",
    "Logprob",
    "ModelLoadError",
    "NanoFlowError",
    "OverloadedError",
    "RequestOptions",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "Tokenizer",
    "__version__",
]


def __getattr__(name: str) -> object:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
