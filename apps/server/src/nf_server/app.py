"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

from nf_runtime import AsyncEngine
from nf_server import __version__
from nf_server.errors import install_error_handlers
from nf_server.middleware import RequestContext
from nf_server.routes import chat, completions, models, ops
from nf_server.service import InferenceService
from nf_server.settings import ServerSettings


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The OpenAI-compatible application over a started `engine`.

    The application does not own the engine: whoever started it shuts it down. Its
    `InferenceService` is `app.state.service`.
    """
    app = FastAPI(
        title="NanoFlow",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = InferenceService(engine, settings)
    app.add_middleware(RequestContext)
    install_error_handlers(app)
    for module in (models, completions, chat, ops):
        app.include_router(module.router)
    return app
