"""`POST /v1/completions`."""

from __future__ import annotations

import functools

from fastapi import APIRouter, Request
from starlette.responses import Response

from nf_runtime import SamplingParams
from nf_server.generation import Generation
from nf_server.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    Prompt,
    parse_prompts,
)
from nf_server.render.completions import CompletionAnswer, CompletionShape, CompletionStream
from nf_server.render.head import AnswerHead
from nf_server.responses import EventStream, json_answer
from nf_server.routes.requests import (
    counting_rejections,
    new_record,
    now,
    read_request,
    request_options,
    service_of,
)
from nf_server.sampling import sampling_params, token_budget
from nf_server.service import InferenceService

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    service = service_of(request)
    record = new_record(request, "cmpl", now())
    async with counting_rejections(request):
        body, headers = await read_request(request, CompletionRequest)
        head = AnswerHead(
            record.completion_id, "text_completion", service.resolve_model(body.model)
        )
        prompts = parse_prompts(body.prompt, body.num_choices)
        tokens = await _tokens(service, body, prompts)
        shape = _shape(service, body, prompts, tokens)
        generation = service.admit(
            [(t, _params(service, body, t)) for t in tokens],
            record,
            options=request_options(request, body),
        )
    if body.stream:
        renderer = CompletionStream(
            head,
            generation.streams,
            shape,
            usage=generation.usage if body.include_usage else None,
            continuous=body.continuous_usage,
        )
        return EventStream(generation, renderer, headers, service.settings.ping_seconds)
    return await _answer(generation, head, shape, request, headers)


async def _answer(
    generation: Generation,
    head: AnswerHead,
    shape: CompletionShape,
    request: Request,
    headers: dict[str, str],
) -> Response:
    answer = CompletionAnswer(head, generation.streams, shape)
    return await json_answer(generation, answer, request, headers)


async def _tokens(
    service: InferenceService, body: CompletionRequest, prompts: list[Prompt]
) -> list[list[int]]:
    texts = [prompt.text for prompt in prompts if prompt.text is not None]
    encoded = iter(
        await service.encode(texts, add_special_tokens=body.add_special_tokens is not False)
    )
    return [next(encoded) if p.token_ids is None else p.token_ids for p in prompts]


def _params(
    service: InferenceService, body: CompletionRequest, tokens: list[int]
) -> SamplingParams:
    budget = token_budget(
        len(tokens),
        service.context_length,
        asked=body.max_tokens,
        default=DEFAULT_MAX_TOKENS,
        prompt_field="prompt",
        limit_field="max_tokens",
    )
    return sampling_params(
        body,
        service.defaults,
        max_tokens=budget,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else body.prompt_logprobs,
    )


def _shape(
    service: InferenceService,
    body: CompletionRequest,
    prompts: list[Prompt],
    tokens: list[list[int]],
) -> CompletionShape:
    decode = service.engine.tokenizer.decode
    echo = None
    if body.echo:
        echo = [
            decode(ids, skip_special_tokens=False) if prompt.text is None else prompt.text
            for prompt, ids in zip(prompts, tokens, strict=True)
        ]
    return CompletionShape(
        num_choices=body.num_choices,
        echo=echo,
        logprobs=body.logprobs is not None,
        decode=functools.cache(lambda token_id: decode([token_id], skip_special_tokens=False)),
        prompt_logprobs=body.prompt_logprobs is not None,
    )
