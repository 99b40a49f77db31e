"""`/v1/score`, `/v1/compare`, `/v1/rerank` and `/v2/rerank`: the evaluator of the run."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from selfeval.runs.conversations import AnyQuestion, question_from
from selfeval.serve.bodies import CompareBody, RerankBody, ScoreBody
from selfeval.serve.replies import unless_gone
from selfeval.serve.served_run import SCORER
from selfeval.serve.service import Service, service_of

__all__ = ["DIGITS", "router"]

router = APIRouter(tags=["scores"])

DIGITS = 6
"""Decimals of scores and probabilities: the last bits depend on the other texts of a pass."""


@router.post("/v1/score")
async def score(body: ScoreBody, request: Request) -> JSONResponse:
    """Score the replies to one or several questions; higher is better. Scores of one question are comparable."""
    service, items = service_of(request), body.all_items
    evaluator = service.check_scorer(body.model)
    asked = [(item.asked, reply) for item in items for reply in item.replies]
    scores, tokens = await _scored(service, request, "replies", asked)
    rest, data = iter(scores), []
    for index, item in enumerate(items):
        found = evaluator.ranking_of(item.replies, [next(rest) for _ in item.replies], evaluator.sure_or(body.sure))
        data.append(
            {
                "object": "score",
                "index": index,
                "scores": [round(value, DIGITS) for value in found.scores],
                "preferred": found.preferred,
                "confidence": None if found.confidence is None else round(found.confidence, DIGITS),
                "unsure": found.unsure,
                "calibrated": found.calibrated,
            }
        )
    return JSONResponse({"object": "list", "model": SCORER, "data": data, "usage": _usage(tokens)})


@router.post("/v1/compare")
async def compare(body: CompareBody, request: Request) -> JSONResponse:
    """Compare two replies to a question: the probability that a is better, and the preferred one or "unsure"."""
    service = service_of(request)
    evaluator = service.check_scorer(body.model)
    (a, b), tokens = await _scored(service, request, "replies", [(body.asked, body.a), (body.asked, body.b)])
    found = evaluator.comparison_of((body.a, body.b), (a, b), evaluator.sure_or(body.sure))
    assert found.probability is not None, "an evaluator always has a probability"
    return JSONResponse(
        {
            "object": "comparison",
            "model": SCORER,
            "probability": round(found.probability, DIGITS),
            "preferred": found.preferred,
            "state": found.state.value,
            "scores": {"a": round(a, DIGITS), "b": round(b, DIGITS)},
            "calibrated": found.calibrated,
            "usage": _usage(tokens),
        }
    )


@router.post("/v1/rerank")
async def rerank(body: RerankBody, request: Request) -> JSONResponse:
    """Order documents by the evaluator's score as replies to the query, in the formats of Cohere's v1 and Jina's API."""
    return await _reranked(service_of(request), request, body, version="1")


@router.post("/v2/rerank")
async def rerank_v2(body: RerankBody, request: Request) -> JSONResponse:
    """Order documents by the evaluator's score as replies to the query, in the format of Cohere's v2."""
    return await _reranked(service_of(request), request, body, version="2")


async def _reranked(service: Service, request: Request, body: RerankBody, *, version: str) -> JSONResponse:
    evaluator, texts = service.check_scorer(body.model), body.texts
    scores, tokens = await _scored(service, request, "documents", [(body.query, text) for text in texts])
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": round(value, DIGITS)}
        for index, value in zip(order, evaluator.relevance([scores[index] for index in order]), strict=True)
    ]
    if body.return_documents:
        results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
    return JSONResponse(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "object": "list",
            "model": SCORER,
            "results": results,
            "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
            "usage": _usage(tokens),
        }
    )


async def _scored(
    service: Service, request: Request, name: str, asked: Sequence[tuple[AnyQuestion, str]]
) -> tuple[list[float], int]:
    """Score replies; return the scores, and the number of tokens of questions and replies."""
    service.check_count(name, len(asked), service.limits.texts, "--max-texts")
    service.check_characters("question", *(question_from(question).text for question, _ in asked))
    service.check_characters(name, *(reply for _, reply in asked))
    tokens = await service.tokenized(lambda: _check_lengths(service, name, asked))
    with service.admitted(scorings=1):
        service.metrics.tokens.labels("scored").inc(tokens)
        work = service.scores([question for question, _ in asked], [reply for _, reply in asked])
        return await unless_gone(request, work), tokens


def _check_lengths(service: Service, name: str, asked: Sequence[tuple[AnyQuestion, str]]) -> int:
    tokenizer, total = service.run.model.templates.tokenizer, 0
    questions: dict[str, int] = {}
    for question, reply in asked:
        text = question_from(question).text
        if text not in questions:
            ids = tokenizer.encode(text, add_special_tokens=False)
            service.check_tokens("question", ids)
            questions[text] = len(ids)
        ids = tokenizer.encode(reply, add_special_tokens=False)
        service.check_tokens(name, ids)
        total += questions[text] + len(ids)
    return total


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
