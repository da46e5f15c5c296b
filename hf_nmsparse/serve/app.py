"""The application: its routes, what each error becomes, and the models at work while it runs."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.keys import Keys
from hf_nmsparse.serve.libretranslate import libretranslate
from hf_nmsparse.serve.limits import Limits
from hf_nmsparse.serve.metrics import Metrics, Watched
from hf_nmsparse.serve.models import Models
from hf_nmsparse.serve.native import native
from hf_nmsparse.serve.page import page
from hf_nmsparse.terminal import named, one_line, plain
from hf_nmsparse.version import __version__

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_CLOSED = 499  # as nginx calls it: nobody reads the answer


def create_app(
    models: Models, limits: Limits | None = None, api_keys: Sequence[str] = (), origins: Sequence[str] = ()
) -> FastAPI:
    """The ASGI application that translates with some models, for uvicorn and whatever else runs one.

    The models begin to work as it starts, and finish what was taken as it stops.

    Args:
        models: The models, as `load_models` gives them.
        limits: Of a request.
        api_keys: The keys of who may translate; everybody may if there are none.
        origins: Of pages elsewhere whose scripts may ask, such as ``"https://example.org"``; ``"*"`` is any.
    """
    limits, keys, metrics = limits or Limits(), Keys(api_keys), Metrics()

    @asynccontextmanager
    async def at_work(_: FastAPI) -> AsyncIterator[None]:
        models.start(limits, metrics)
        try:
            yield
        finally:
            models.close()

    # The pages on its interface that FastAPI brings take their scripts from elsewhere.
    app = FastAPI(title="nmsparse serve", version=__version__, lifespan=at_work, docs_url=None, redoc_url=None)
    app.include_router(libretranslate(models, limits, keys))
    app.include_router(native(models, limits, keys))
    app.include_router(page())

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", include_in_schema=False)
    async def measured(request: Request) -> Response:
        keys.check(request)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _error(error.status, str(error), error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, error.detail, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLOSED)

    @app.exception_handler(ValueError)
    async def failed(request: Request, error: ValueError) -> Response:
        """What the model did not do, though the request is right."""
        logger.error("%s: %s", request.url.path, plain(named(error), breaks=""))
        return _error(500, one_line(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return _error(500, "something is wrong here, which the server's log names")

    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
        max_age=86_400,
    )
    app.add_middleware(Watched, metrics=metrics)
    return app


def _error(status: int, message: str, headers: object = None) -> JSONResponse:
    """An error in LibreTranslate's shape."""
    return JSONResponse({"error": message}, status, dict(headers) if isinstance(headers, dict) else None)
