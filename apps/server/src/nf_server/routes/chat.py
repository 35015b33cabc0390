"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nf_server.protocol.chat import ChatCompletionRequest
from nf_server.render.chat import ChatAnswer, ChatStream
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

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    record = new_record(request, "chatcmpl", now())
    async with counting_rejections(request):
        body, headers = await read_request(request, ChatCompletionRequest)
        model = service.resolve_model(body.model)
        tokens = await service.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            kwargs=body.chat_template_kwargs or {},
        )
        budget = token_budget(
            len(tokens),
            service.context_length,
            asked=body.token_limit,
            default=None,
            prompt_field="messages",
            limit_field=body.token_limit_field,
        )
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling_params(
            body,
            service.defaults,
            max_tokens=budget,
            logprobs=top_logprobs,
            prompt_logprobs=body.prompt_logprobs,
        )
        generation = service.admit(
            [(tokens, params)], record, options=request_options(request, body)
        )
    if body.stream:
        renderer = ChatStream(
            AnswerHead(record.completion_id, "chat.completion.chunk", model),
            body.num_choices,
            top_logprobs=top_logprobs,
            usage=generation.usage if body.include_usage else None,
            continuous=body.continuous_usage,
        )
        return EventStream(generation, renderer, headers, service.settings.ping_seconds)
    answer = ChatAnswer(
        AnswerHead(record.completion_id, "chat.completion", model),
        generation.streams,
        body.num_choices,
        top_logprobs=top_logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
    )
    return await json_answer(generation, answer, request, headers)
