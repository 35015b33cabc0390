"""What the engine process and its parent say to each other: JSON frames on a socket.

A frame is its length, 4 bytes little-endian, and a JSON object whose first key says what it is. The
parent sends `config` once, then `add`, `abort`, `ask` and `stop`. The engine process sends `ready`
(with `stats`) once it has loaded, then `outputs` (with `stats`) after every iteration, `refused`
for a request that it cannot run or has no room for, `answer` to what was asked, and `failed` when
it has to end.
"""

import json
import struct
from dataclasses import asdict, astuple, fields, replace
from typing import Any

from nf_kvcache.disk import DiskStats
from nf_kvcache.stats import LowerTierStats
from nf_runtime.engine_types import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    RequestOptions,
    TokenOutput,
)
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.sampling_params import SamplingParams
from nf_scheduler import FinishReason, Ledger

HEADER = struct.Struct("<I")


def pack(message: dict[str, Any]) -> bytes:
    """Make a frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return HEADER.pack(len(body)) + body


def request_to_json(request: EngineRequest) -> dict[str, Any]:
    """A request as JSON takes it."""
    return {
        "request_id": request.request_id,
        "prompt_token_ids": request.prompt_token_ids,
        "params": asdict(request.params),
        "seed": request.seed,
        "options": asdict(request.options),
        "fork_of": request.fork_of,
    }


def request_from_json(value: dict[str, Any]) -> EngineRequest:
    """The request that `request_to_json` was given."""
    params = value["params"]
    if params["logit_bias"] is not None:  # JSON turns the token ids into strings
        params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
    options = RequestOptions(**value["options"])
    return EngineRequest(**(value | {"params": SamplingParams(**params), "options": options}))


def output_to_json(output: TokenOutput) -> list[Any]:
    """An output as JSON takes it: a bare list, because there is one per token."""
    return [
        output.request_id,
        output.token_id,
        output.finish_reason,
        output.stop_token,
        output.logprobs and astuple(output.logprobs),
        None
        if output.prompt_logprobs is None
        else [astuple(row) for row in output.prompt_logprobs],
        output.ledger and asdict(output.ledger),
    ]


def output_from_json(value: list[Any]) -> TokenOutput:
    """The output that `output_to_json` was given."""
    request_id, token_id, reason, stop_token, logprobs, prompt_logprobs, ledger = value
    return TokenOutput(
        request_id,
        token_id,
        reason and FinishReason(reason),
        stop_token,
        logprobs and RowLogprobs(*logprobs),
        None if prompt_logprobs is None else [RowLogprobs(*row) for row in prompt_logprobs],
        ledger and Ledger(**ledger),
    )


def info_from_json(value: dict[str, Any]) -> EngineInfo:
    """What `dataclasses.asdict` made of an `EngineInfo`."""
    return EngineInfo(**(value | {"eos_token_ids": tuple(value["eos_token_ids"])}))


def stats_to_json(stats: EngineStats) -> list[Any]:
    """The fields in order; what is known of lower tiers by name."""
    values = [getattr(stats, field.name) for field in fields(stats)[:-1]]
    return [*values, stats.lower_tiers and asdict(stats.lower_tiers)]


def stats_from_json(value: list[Any]) -> EngineStats:
    """The stats that `stats_to_json` was given."""
    stats = EngineStats(*value)
    if stats.lower_tiers is None:
        return stats
    lower: dict[str, Any] = value[-1]
    disk = lower["disk"] and DiskStats(**lower["disk"])
    return replace(stats, lower_tiers=LowerTierStats(**(lower | {"disk": disk})))
