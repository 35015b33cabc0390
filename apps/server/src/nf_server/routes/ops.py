"""`GET /health`, `/metrics` and `/version`: for whoever operates the server."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nf_server import __version__
from nf_server.errors import ApiError
from nf_server.routes.requests import service_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine can answer, else 503 with the reason."""
    engine = service_of(request).engine
    if not engine.is_alive:
        raise ApiError(
            503,
            f"The engine process has stopped: {engine.dead_reason or 'no reason was reported'}",
            code="engine_dead",
            type="server_error",
            headers={"retry-after": "5"},
        )
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in the Prometheus exposition format."""
    body, content_type = service_of(request).metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


@router.get("/version")
async def version() -> JSONResponse:
    """The version of the server."""
    return JSONResponse({"version": __version__})
