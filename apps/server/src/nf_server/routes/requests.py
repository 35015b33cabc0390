"""What the generating routes share: from a request's body to its admitted generation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request

from nf_server.body import read_json_object
from nf_server.errors import ApiError
from nf_server.protocol.common import GenerationRequest, parse_request
from nf_server.protocol.fields import warnings_header
from nf_server.request_log import RequestRecord, log_rejected
from nf_server.service import InferenceService

Body = TypeVar("Body", bound=GenerationRequest)


def service_of(request: Request) -> InferenceService:
    """The application's service."""
    service = request.app.state.service
    if not isinstance(service, InferenceService):
        raise TypeError(f"app.state.service is {type(service).__name__}")
    return service


@asynccontextmanager
async def counting_rejections(request: Request) -> AsyncIterator[None]:
    """Count and log the request as rejected when the block raises an `ApiError`."""
    try:
        yield
    except ApiError as error:
        service_of(request).metrics.rejected()
        log_rejected(
            request.state.request_id, request.url.path, error.status, error.code, error.message
        )
        raise


async def read_request(request: Request, model: type[Body]) -> tuple[Body, dict[str, str]]:
    """The validated body of `request`, and the response headers that warn about its fields.

    Raises:
        ApiError: 400, 404 or 413.
    """
    service = service_of(request)
    body = parse_request(model, await read_json_object(request, service.settings.max_body_bytes))
    extra: dict[str, Any] = body.model_extra or {}
    return body, warnings_header(service.fields.unknown(extra))


def new_record(request: Request, prefix: str, started: float) -> RequestRecord:
    """The account of a request that arrived at `started` (`time.monotonic()`)."""
    return RequestRecord(
        request_id=request.state.request_id,
        completion_id=f"{prefix}-{uuid.uuid4().hex}",
        model=service_of(request).settings.model_name,
        started=started,
    )


def now() -> float:
    """The clock of records."""
    return time.monotonic()
