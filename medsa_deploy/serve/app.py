"""A service → the application: the routes of all protocols, and errors as answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medsa_deploy.errors import MedsaError

from .access import LOOPBACK, Access
from .api import api_routes
from .monai_label import monai_label_routes
from .nninteractive import nninteractive_routes
from .refusals import CancelledError, RefusedError, status_of
from .service import Service

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def application(service: Service, *, token: str | None) -> ASGIApp:
    """The application, which lets through only requests with the token."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "bundles": [b.name for b in service.bundles]})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")

    async def failed(request: Request, error: Exception) -> Response:
        service.events.write("fault", {"text": str(error)}, kind=type(error).__name__)
        return JSONResponse({"detail": "the server failed"}, 500)

    app = Starlette(
        routes=[
            *(Route(path, _file(*page), methods=["GET"]) for path, page in PAGE.items()),
            Route("/healthz", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            *api_routes(service),
            *nninteractive_routes(service),
            *monai_label_routes(service),
        ],
        exception_handlers={
            MedsaError: _refused,
            ClientDisconnect: _closed,
            HTTPException: _http_error,
            Exception: failed,
        },
    )
    hosts = None if token is not None else (*LOOPBACK, service.options.host)
    return Counted(Access(app, token=token, hosts=hosts), service)


class Counted:
    """The application, with its requests counted by route and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.service.metrics.count(
                    "medsa_serve_requests_total",
                    route=getattr(route, "path", "none"),
                    status=str(message["status"]),
                )
            await send(message)

        await self.app(scope, receive, counted)


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that answers a file of the page."""
    content = files("medsa_deploy.serve").joinpath("page").joinpath(name).read_bytes()

    async def handler(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return handler


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, MedsaError)
    headers = {}
    if isinstance(error, RefusedError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse({"detail": str(error)}, status_of(error), headers)


async def _closed(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the client has gone"}, CancelledError.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
