"""Errors as REST tells them: RFC 9457 problem documents with our `code` and `hint`.

The status follows from the error's code: the longest entry of `STATUS` that is a dotted prefix of it. A defect of our
own becomes a 500 that says nothing of its insides; the log has them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloud_hub.ground.refusals import NotAllowed, NotFound, Throttled
from shared.errors import OutriderError

__all__ = [
    "MEDIA_TYPE",
    "STATUS",
    "NotAllowed",
    "NotFound",
    "Throttled",
    "install",
    "problem",
    "problem_of",
    "status_of",
]

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

STATUS: Final[Mapping[str, int]] = {
    "auth": 403,
    "auth.missing": 401,
    "auth.unknown_token": 401,
    "auth.expired_token": 401,
    "enrol": 403,
    "enrol.csr": 422,
    "enrol.name_taken": 409,
    "enrol.old_certificate": 409,
    "enrol.token_unknown": 401,
    "enrol.token_spent": 409,
    "enrol.token_expired": 410,
    "not_found": 404,
    "conflict": 409,
    "invalid": 422,
    "length_required": 411,
    "model": 422,
    "protocol": 400,
    "protocol.too_large": 413,
    "rate": 429,
    "renew": 403,
    "renew.same_key": 422,
    "rounds": 422,
    "rounds.flower_missing": 501,
    "rounds.worker_lost": 503,
    "storage": 503,
    "storage.full": 507,
    "timeout": 504,
    "transfer": 502,
    "transfer.corrupt": 422,
    "transfer.unreachable": 503,
    "trust": 422,
    "config": 500,
    "config.clock": 503,
}


def status_of(code: str) -> int:
    """The HTTP status for an error's code; 500 for a code that the table does not know."""
    parts = code.split(".")
    for length in range(len(parts), 0, -1):
        status = STATUS.get(".".join(parts[:length]))
        if status is not None:
            return status
    return 500


def problem(
    *, status: int, code: str, detail: str, hint: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document as a response (RFC 9457, section 3)."""
    document: dict[str, object] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if hint:
        document["hint"] = hint
    return JSONResponse(document, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def problem_of(error: OutriderError) -> Response:
    """The response for an error of ours."""
    status = status_of(error.code)
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Throttled):
        headers["Retry-After"] = str(error.retry_after_s)
    elif status == 503:
        headers["Retry-After"] = "2"
    if status >= 500:
        logger.error("request failed: %s: %s", error.code, error.message)
    return problem(status=status, code=error.code, detail=error.message, hint=error.hint, headers=headers)


def install(app: FastAPI) -> None:
    """Make the application answer every error as a problem document."""

    async def ours(_request: Request, error: Exception) -> Response:
        assert isinstance(error, OutriderError)
        return problem_of(error)

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:8]
        )
        return problem(status=422, code="invalid.request", detail=faults, hint="see /openapi.json for the shape")

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found.route", 405: "method_not_allowed"}
        detail = f"{request.method} {request.url.path}: {error.detail}"
        code = codes.get(error.status_code, f"http.{error.status_code}")
        return problem(status=error.status_code, code=code, detail=detail, headers=error.headers)

    async def defect(_request: Request, _error: Exception) -> Response:
        # The server logs the traceback when the framework raises it again after this answer.
        return problem(status=500, code="internal", detail="the hub failed to answer; its log says why")

    app.add_exception_handler(OutriderError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, defect)
