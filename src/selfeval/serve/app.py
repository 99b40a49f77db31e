"""The ASGI application: endpoints, errors and the gate in front of them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from selfeval import __version__
from selfeval.backbone.adapters import BASE
from selfeval.serve import completions, embeddings, scores, status
from selfeval.serve.api_errors import ErrorBody, handle_errors
from selfeval.serve.gate import Access, Gate
from selfeval.serve.process import Application
from selfeval.serve.replies import ClientGone
from selfeval.serve.served_run import SCORER, ServedRun
from selfeval.serve.service import Service

__all__ = ["make_app"]


def make_app(service: Service, access: Access, pages: APIRouter | None = None) -> Application:
    """Return the application.

    Args:
        service: the run and its worker, which must be started by the caller.
        access: who may use it.
        pages: Optional. The pages of `selfeval view`. Default: none.
    """
    # The pages of /docs load scripts from another server, so there are none.
    api = FastAPI(
        title="Self-Evaluator",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # Every endpoint may answer with an error; this also replaces FastAPI's own 422.
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for module in (completions, scores, embeddings, status):
        api.include_router(module.router)
    if pages is not None:
        api.include_router(pages)
    schema = api.openapi()
    _name_models(schema, service.run)
    handle_errors(api)
    api.add_exception_handler(ClientGone, _nobody)
    gate = Gate(api, access, service.limits.body_bytes, service.metrics)
    api.state.service, api.state.gate = service, gate
    return Application(api, gate)


def _name_models(schema: dict[str, Any], run: ServedRun) -> None:
    """Write the names that `model` may have into the schema, which FastAPI then serves as it is."""
    bodies = schema["components"]["schemas"]
    allowed = {"ChatBody": [*run.guides], "CompletionBody": [*run.guides], "EmbeddingBody": [BASE]}
    if run.evaluator is not None:
        allowed |= {name: [SCORER] for name in ("RerankBody", "ScoreBody", "CompareBody")}
    for name, models in allowed.items():
        found = bodies[name]["properties"]["model"]
        (found["anyOf"][0] if "anyOf" in found else found)["enum"] = models
    (parameter,) = schema["paths"]["/v1/models/{model}"]["get"]["parameters"]
    parameter["schema"]["enum"] = run.names


def _nobody(request: Request, error: Exception) -> Response:
    """End a request whose client has left; nobody receives the response."""
    return Response(status_code=499)
