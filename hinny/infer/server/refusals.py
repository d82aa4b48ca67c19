"""What a client is told when there is no answer, in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error", 405: "invalid_request_error",
         429: "rate_limit_error", 500: "server_error", 503: "unavailable_error", 504: "timeout_error"}


class Fault(BaseModel):
    """What was wrong, with which parameter, and what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class FaultBody(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: Fault


class Refusal(Exception):
    """Ends a request with this status and error body."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": ...}"""
        kind = KINDS.get(self.status, "invalid_request_error")
        return FaultBody(error=Fault(message=self.message, type=kind, param=self.param, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def draining() -> Refusal:
    """To requests that come after SIGTERM."""
    return Refusal(503, "the server is shutting down; send the request to another one.", code="draining",
                   headers={"Retry-After": "5"})
