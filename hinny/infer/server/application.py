"""The addresses of a server and the description of them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from hinny import __version__
from hinny.errors import RequestError
from hinny.infer.server.connection import ClientLeft
from hinny.infer.server.guard import Guard
from hinny.infer.server.refusals import FaultBody, Refusal
from hinny.infer.server.schemas import ChatRequest, CompletionRequest
from hinny.infer.server.service import LEFT, Service

FAULTS = {400: "It cannot be served as it is.", 401: "An API key is missing or wrong.",
          403: "Another machine's name for this one.", 404: "Not here.",
          405: "Another method.", 408: "The body came too slowly.", 413: "The body is too long.",
          415: "The body is not JSON.", 429: "Too many wait.", 500: "The engine failed.", 503: "Shutting down.",
          504: "It took too long."}
WORDS = {404: "there is nothing at this address.", 405: "this address takes another method."}


def application(service: Service) -> FastAPI:
    """The ASGI application; its lifespan starts and ends the service's loop."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await service.loop.close()

    app = FastAPI(title="hinny", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
                  redirect_slashes=False)
    _add_endpoints(app, service)
    _add_faults(app, service)
    paths = [route.path for route in app.routes if "{" not in route.path]  # type: ignore[attr-defined]
    app.add_middleware(Guard, service=service, paths=paths)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _add_endpoints(app: FastAPI, service: Service) -> None:
    html, policy = _page()

    async def completions(http: Request) -> Response:
        """Continue a prompt."""
        return await service.completion(http)

    async def chat(http: Request) -> Response:
        """Answer the last message of a conversation."""
        return await service.chat_completion(http)

    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [service.model(service.options.name)]})

    async def model(name: str) -> Response:
        """The model of this name."""
        return JSONResponse(service.model(name))

    async def health() -> Response:
        """Whether requests are welcome, and how many there are."""
        status, body = service.health()
        later = {} if status == 200 else {"Retry-After": "5"}
        return JSONResponse(body, status, {"Cache-Control": "no-store", **later})

    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page() -> Response:
        """A page to try the model on."""
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer",
                                           "X-Frame-Options": "DENY"})

    answers, figures = _responses("application/json", "text/event-stream"), _responses("application/json")
    app.post("/v1/completions", response_model=None, responses=answers,
             openapi_extra=_body(CompletionRequest))(completions)
    app.post("/v1/chat/completions", response_model=None, responses=answers, openapi_extra=_body(ChatRequest))(chat)
    app.get("/v1/models", response_model=None, responses=figures)(models)
    app.get("/v1/models/{name:path}", response_model=None, responses=figures)(model)
    app.get("/health", response_model=None, responses=figures)(health)
    app.get("/metrics", response_model=None, responses=_responses("text/plain"))(metrics)
    app.get("/", response_model=None, include_in_schema=False)(page)


def _add_faults(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(RequestError)
    async def mistaken(_: Request, mistake: RequestError) -> Response:
        return Refusal(400, str(mistake)).response()

    @app.exception_handler(ClientLeft)
    async def left(_: Request, __: ClientLeft) -> Response:
        service.metrics.cancelled.inc()
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def lost(_: Request, fault: HTTPException) -> Response:
        return Refusal(fault.status_code, WORDS.get(fault.status_code, fault.detail), headers=fault.headers).response()


def _page() -> tuple[str, str]:
    """The page and the policy that lets a browser run its own script and style, and talk to this server alone."""
    html = resources.files("hinny.infer.server").joinpath("page.html").read_text()

    def hashed(tag: str) -> str:
        digest = hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", html, re.DOTALL)[1].encode()).digest()  # type: ignore[index]
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return html, (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
                  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _responses(*kinds: str) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", "content": {kind: {} for kind in kinds}}}
    fault = {"application/json": {"schema": {"$ref": "#/components/schemas/FaultBody"}}}
    return found | {status: {"description": words, "content": fault} for status, words in FAULTS.items()}


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description; bodies are read by `schemas.read`, so their schemas are put in here."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for operations in found["paths"].values():
        for operation in operations.values():
            # FastAPI's own, of parameters that it checks; a path's text is never wrong
            operation["responses"].pop("422", None)
    kinds: list[type[BaseModel]] = [CompletionRequest, ChatRequest, FaultBody]
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds],
                                    ref_template="#/components/schemas/{model}")
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return found
