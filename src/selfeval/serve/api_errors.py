"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from selfeval.errors import InputError, MemoryLimitError, NotFiniteError, RunFolderError, StorageError
from selfeval.serve.bodies import NEUTRAL
from selfeval.texts import safe_json, shortened

__all__ = ["ApiError", "ErrorBody", "api_error_from", "error_response", "handle_errors"]

_LOG = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that the client receives.

    Args:
        status: HTTP status.
        message: what was received, what is allowed and what to do.
        code: short name for programs.
        param: Optional. Name of the parameter that is wrong.
        headers: Optional. Additional headers.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.body, error.status, dict(error.headers or {}))


def api_error_from(error: Exception) -> ApiError:
    """Return the error that a client receives; messages about bugs and about files of the server stay in its log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryLimitError):
        return ApiError(503, str(error), "out_of_memory")
    if isinstance(error, NotFiniteError):
        return ApiError(500, str(error), "not_finite")
    if isinstance(error, (RunFolderError, StorageError)):
        _LOG.error("%s", error)
        return ApiError(500, "the server cannot use a file of its run; the message is in the log of the server", "file_error")
    if isinstance(error, InputError):
        return ApiError(400, str(error), "invalid_value")
    return ApiError(
        500, f"internal error ({type(error).__name__}); the traceback is in the log of the server", "internal_error"
    )


def handle_errors(app: FastAPI) -> None:
    """Answer every exception, also those of the framework, in the same format."""
    app.add_exception_handler(ApiError, _own)
    app.add_exception_handler(InputError, _own)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(RequestValidationError, _of_body)
    app.add_exception_handler(Exception, _own)


def _own(request: Request, error: Exception) -> Response:
    return error_response(api_error_from(error))


def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "invalid_request")
    message = {
        404: f"there is no {request.url.path} here; /openapi.json lists the endpoints",
        405: f"{request.url.path} does not accept {request.method}",
    }.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, code, headers=error.headers))


def _of_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = "" if first["type"] == "json_invalid" else _param(first["loc"])  # a position in the body, not a name
    return error_response(ApiError(400, _sentence(first, where), "invalid_value", param=where or None))


def _param(path: Sequence[Any]) -> str:
    """Return a name such as `messages.0.content`; the names of pydantic's union branches are left out."""
    rest = [str(part) for part in path if part != "body" and not _is_branch(str(part))]
    return ".".join(rest)


def _is_branch(part: str) -> bool:
    return "[" in part or part in ("str", "int", "constrained-str") or part[:1].isupper()


def _sentence(problem: Mapping[str, Any], where: str) -> str:
    kind, name = problem["type"], where.rpartition(".")[2]
    if kind == "extra_forbidden":
        return f'this server does not support the parameter "{name}"; remove it (/openapi.json lists the parameters)'
    if where in NEUTRAL:
        return f'this server does not support "{where}"; remove it, or pass {NEUTRAL[where]}'
    if kind == "missing":
        return f'the parameter "{where}" is missing' if where else "the body is missing; send a JSON object"
    if kind == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    got = shortened(safe_json(problem["input"])) if _is_plain(problem.get("input")) else type(problem.get("input")).__name__
    return f"{where or 'the body'}: {problem['msg']}; got {got}"


def _is_plain(value: Any) -> bool:
    try:
        safe_json(value)
    except (TypeError, ValueError, RecursionError):  # bytes of a body that is not JSON, or NaN
        return False
    return True
