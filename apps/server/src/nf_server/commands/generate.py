"""`nanoflow generate`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from nf_server.commands.failure import fail

INTERRUPTED = 130


def run(
    engine_options: dict[str, Any],
    sampling_options: dict[str, Any],
    prompt: str,
    *,
    chat: bool,
    use_generation_config: bool,
    as_json: bool,
) -> None:
    """Generate once and print the text as it comes; "-" reads the prompt from stdin."""
    text = sys.stdin.read() if prompt == "-" else prompt
    from nf_runtime import EngineConfig, NanoFlowError

    try:
        config = EngineConfig(**engine_options)
        work = _generate(config, sampling_options, text, chat, use_generation_config, as_json)
        asyncio.run(work)
    except NanoFlowError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


async def _generate(
    config: Any,
    sampling_options: dict[str, Any],
    text: str,
    chat: bool,
    use_generation_config: bool,
    as_json: bool,
) -> None:
    from nf_runtime import AsyncEngine, SamplingParams
    from nf_server.sampling import effective_defaults

    # Parameters are checked before the model is loaded, and once more with the model's defaults.
    SamplingParams(**sampling_options)
    engine = await AsyncEngine.start(config)
    try:
        defaults = effective_defaults(engine.generation_defaults, use_generation_config)
        params = SamplingParams(**{**defaults, **sampling_options})
        result = await _stream(engine, _encode(engine, text, chat), params, not as_json)
    finally:
        await engine.shutdown()
    if as_json:
        print(json.dumps({"model": str(config.model), **result}, ensure_ascii=False))
    else:
        print()
    print(
        f"{result['completion_tokens']} tokens in {result['seconds']:.2f} s "
        f"({result['tokens_per_second']:.1f} tokens/s), "
        f"prompt {result['prompt_tokens']} tokens, ended by {result['finish_reason']}",
        file=sys.stderr,
    )


def _encode(engine: Any, text: str, chat: bool) -> list[int]:
    from nf_runtime import InvalidRequestError

    tokenizer = engine.tokenizer
    if not chat:
        return list(tokenizer.encode(text))
    if not tokenizer.has_chat_template:
        raise InvalidRequestError("the model has no chat template; leave out --chat")
    return list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
    )


async def _stream(engine: Any, prompt: list[int], params: Any, show: bool) -> dict[str, Any]:
    write: Callable[[str], object] = sys.stdout.write if show else lambda _: None
    parts: list[str] = []
    finish_reason = None
    started = time.monotonic()
    stream = engine.submit(prompt, params)
    try:
        async for deltas in stream:
            for delta in deltas:
                parts.append(delta.text)
                write(delta.text)
                finish_reason = delta.finish_reason or finish_reason
            sys.stdout.flush()
    finally:
        await stream.aclose()
    seconds = time.monotonic() - started
    return {
        "text": "".join(parts),
        "finish_reason": finish_reason,
        "prompt_tokens": stream.usage.prompt_tokens,
        "completion_tokens": stream.usage.completion_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(stream.usage.completion_tokens / max(seconds, 1e-9), 2),
    }
