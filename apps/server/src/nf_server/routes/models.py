"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from nf_server.routes.requests import service_of
from nf_server.service import InferenceService

router = APIRouter()

_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """Every name the model answers to."""
    service = service_of(request)
    cards = [_card(service, name) for name in service.settings.model_names]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> JSONResponse:
    """One model; 404 when it is not served."""
    service = service_of(request)
    return JSONResponse(_card(service, service.resolve_model(model_id)))


def _card(service: InferenceService, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "nanoflow",
        "root": str(service.engine.info.model),
        "parent": None,
        "max_model_len": service.context_length,
    }
