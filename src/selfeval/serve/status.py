"""`/health`, `/metrics` and `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from selfeval.backbone.adapters import BASE
from selfeval.serve.api_errors import ApiError
from selfeval.serve.gate import authorized
from selfeval.serve.served_run import SCORER
from selfeval.serve.service import Service, service_of
from selfeval.texts import safe_json, shortened

__all__ = ["router"]

router = APIRouter(tags=["status"])

_REPLIES = ["/v1/chat/completions", "/v1/completions"]
_SCORES = ["/v1/score", "/v1/compare", "/v1/rerank", "/v2/rerank"]


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Say whether the server accepts requests: `ok`, or `draining` with 503. With the token also what it does."""
    service, draining = service_of(request), request.app.state.gate.draining
    body: dict[str, Any] = {"status": "draining" if draining else "ok"}
    if authorized(request.scope):
        worker = service.worker
        body |= {
            "models": service.run.names,
            "running": worker.running,
            "waiting": worker.waiting,
            "scoring": worker.scoring,
            "active_requests": request.app.state.gate.active,
        }
    return JSONResponse(body, 503 if draining else 200)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return figures in the text format of Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """List the models, with the endpoints of each."""
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.run.names]})


@router.get("/v1/models/{model}")
async def model(model: str, request: Request) -> JSONResponse:
    """Describe a model."""
    service = service_of(request)
    if model not in service.run.names:
        message = f"the model {shortened(safe_json(model))} does not exist; models: {', '.join(service.run.names)}"
        raise ApiError(404, message, "model_not_found", param="model")
    return JSONResponse(_model(service, model))


def _model(service: Service, name: str) -> dict[str, Any]:
    endpoints = _SCORES if name == SCORER else _REPLIES
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "selfeval",
        "root": service.run.model.backbone.base_name,
        "max_model_len": service.run.context,
        "endpoints": [*endpoints, *(["/v1/embeddings"] if name == BASE else [])],
    }
