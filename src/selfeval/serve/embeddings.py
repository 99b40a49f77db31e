"""`/v1/embeddings`: mean of the last hidden states of the base."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.serve.api_errors import ApiError
from selfeval.serve.bodies import EmbeddingBody
from selfeval.serve.replies import unless_gone
from selfeval.serve.service import Service, service_of

__all__ = ["embed", "embedded_parts", "router"]

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> JSONResponse:
    """Embed texts: the mean of the base's last hidden states, with length 1.

    The base was not trained to embed, so the cosine of two such vectors is a rough similarity.
    """
    service = service_of(request)
    service.check_embedder(body.model, BASE)
    service.check_count("input", len(body.inputs), service.limits.texts, "--max-texts")
    service.check_characters("input", *(one for one in body.inputs if isinstance(one, str)))
    rows = await service.tokenized(lambda: [_ids(service, one) for one in body.inputs])
    backbone, batch_tokens = service.run.model.backbone, service.run.model.config.backbone.batch_tokens
    tokens = sum(map(len, rows))
    with service.admitted(scorings=1):
        service.metrics.tokens.labels("embedded").inc(tokens)
        steps = [partial(embed, backbone, part, batch_tokens) for part in embedded_parts(rows, batch_tokens)]
        future = asyncio.wrap_future(service.worker.call(steps))
        vectors = np.concatenate(await unless_gone(request, _awaited(future)))
    return await asyncio.to_thread(_response, vectors, body.encoding_format, tokens)


async def _awaited(future: asyncio.Future[list[np.ndarray]]) -> list[np.ndarray]:
    return await future


def embedded_parts(rows: Sequence[Sequence[int]], most: int) -> list[list[Sequence[int]]]:
    """Split rows into parts of at most `most` padded tokens, or of a single row; other requests take turns between them."""
    parts: list[list[Sequence[int]]] = []
    for row in rows:
        if parts and max(map(len, (*parts[-1], row))) * (len(parts[-1]) + 1) <= most:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _response(vectors: np.ndarray, encoding: str | None, tokens: int) -> JSONResponse:
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": BASE, "usage": usage})


def _ids(service: Service, text: str | list[int]) -> list[int]:
    templates, size = service.run.model.templates, service.run.model.backbone.output_head.vocabulary
    ids = templates.tokenizer.encode(text, add_special_tokens=True) if isinstance(text, str) else text
    if max(ids, default=0) >= size:
        raise ApiError(400, f"input has the token {max(ids)}; the model has {size:,} tokens", "invalid_value", param="input")
    if not ids:
        raise ApiError(400, "input has a text without tokens", "invalid_value", param="input")
    service.check_tokens("input", ids)
    if service.run.context is not None and len(ids) > service.run.context:
        message = f"input has {len(ids):,} tokens, the context of this model is {service.run.context:,}; shorten it"
        raise ApiError(400, message, "context_length_exceeded", param="input")
    return ids


def _encoded(vector: np.ndarray, encoding: str | None) -> Any:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


@torch.no_grad()
def embed(backbone: Backbone, rows: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
    """Return the mean of the base's last hidden states over the tokens of each row, divided by its length, `[B, D]` in fp32.

    Args:
        backbone: backbone whose base embeds.
        rows: token ids, at least one in each row.
        batch_tokens: maximum tokens of a micro-batch.
    """
    found: dict[int, np.ndarray] = {}

    def of_group(group: list[int]) -> np.ndarray:
        width, device = max(len(rows[i]) for i in group), backbone.loaded.device
        pad = backbone.loaded.pad_id
        ids_BT = torch.tensor([[*rows[i], *[pad] * (width - len(rows[i]))] for i in group], device=device)
        mask_BT = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in group], device=device)
        hidden_BTD = backbone.hidden(ids_BT, mask_BT).float()
        mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1)[:, None]
        vectors: np.ndarray = torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy()
        return vectors

    with backbone.acting_as(BASE):
        for group, vectors in backbone.budget.in_groups(Phase.SCORE, [len(row) for row in rows], batch_tokens, of_group):
            found.update(zip(group, vectors, strict=True))
    return np.stack([found[index] for index in range(len(rows))])
