"""What the generating routes share: from a request's body to its admitted generation."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request

from nf_runtime import InvalidRequestError, RequestOptions
from nf_server.body import read_json_object
from nf_server.errors import ApiError
from nf_server.protocol.common import GenerationRequest, parse_request
from nf_server.protocol.fields import warnings_header
from nf_server.request_log import RequestRecord, log_rejected
from nf_server.sampling import from_invalid_request
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
        service_of(request).metrics.rejected(error.code)
        log_rejected(
            request.state.request_id, request.url.path, error.status, error.code, error.message
        )
        raise


async def read_request(request: Request, model: type[Body]) -> tuple[Body, dict[str, str]]:
    """The validated body of `request`, and the response headers that warn about its fields.

    Raises:
        ApiError: 400, 404, 413 or 429.
    """
    service = service_of(request)
    service.check_load()
    body = parse_request(model, await read_json_object(request, service.settings.max_body_bytes))
    extra: dict[str, Any] = body.model_extra or {}
    return body, warnings_header(service.fields.unknown(extra))


def request_options(request: Request, body: GenerationRequest) -> RequestOptions:
    """When and next to whom a request runs. Its tenant is whose key it was sent with.

    Raises:
        ApiError: 400.
    """
    key = request.headers.get("authorization", "")
    try:
        return RequestOptions(
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            # The key itself goes no further than here.
            tenant=hashlib.sha256(key.encode()).hexdigest()[:16] if key else "",
            request_class=body.request_class or "",
            timeout_seconds=body.timeout_seconds,
        )
    except InvalidRequestError as error:
        raise from_invalid_request(error) from None


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
