"""`/v1/chat/completions` and `/v1/completions`: replies of the policy, the base or another role."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from selfeval.prompt import Prompt
from selfeval.rollout.requests import Request as RolloutRequest
from selfeval.runs.conversations import AnyQuestion, check_conversations, question_from, questions_from
from selfeval.serve.api_errors import ApiError, api_error_from
from selfeval.serve.bodies import ChatBody, CompletionBody
from selfeval.serve.formats import ChatFormat, CompletionFormat, Format
from selfeval.serve.replies import Event, SampledReply, Spec, replies_to, sampled, unless_gone
from selfeval.serve.reply_text import Piece, ReplyText
from selfeval.serve.scores import DIGITS
from selfeval.serve.service import Service, service_of

__all__ = ["router"]

router = APIRouter(tags=["replies"])

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}, "application/json": {}}}}

_COLDEST = 1e-3


@dataclass(frozen=True)
class _Asked:
    """A request that is checked: its prompts, each with the question that it asks, and how its replies are formatted."""

    body: ChatBody | CompletionBody
    prompts: Sequence[Prompt]
    questions: Sequence[AnyQuestion]
    spec: Spec
    format: Format
    chat: bool

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)


@router.post("/v1/chat/completions", responses=_STREAM)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Reply to a conversation that ends with a message of the user."""
    service = service_of(request)
    role = service.check_replier(body.model)
    turns = [message.as_turn for message in body.messages]
    service.check_characters("messages", *(turn["content"] for turn in turns))
    prompt = await service.tokenized(lambda: _chat_prompt(service, turns))
    limit = service.reply_tokens("messages", prompt, body.max_completion_tokens or body.max_tokens)
    spec = _spec(service, body, role, [prompt], [limit])
    format = ChatFormat(service.run, body.top)
    return await _respond(service, request, _Asked(body, [prompt], [turns], spec, format, chat=True))


@router.post("/v1/completions", responses=_STREAM)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue a text, which is passed to the model as it is."""
    service = service_of(request)
    role = service.check_replier(body.model)
    service.check_count("prompt", len(body.prompts), service.limits.texts, "--max-texts")
    service.check_characters("prompt", *(prompt for prompt in body.prompts if isinstance(prompt, str)))
    prompts = await service.tokenized(lambda: [_raw_prompt(service, prompt) for prompt in body.prompts])
    limits = [service.reply_tokens("prompt", prompt, body.max_tokens) for prompt in prompts]
    spec = _spec(service, body, role, prompts, limits)
    questions = [prompt if isinstance(prompt, str) else _decoded(service, prompt) for prompt in body.prompts]
    if body.best_of is not None:
        questions_from(questions)  # the evaluator refuses an empty question, and should do so before the replies are sampled
    format = CompletionFormat(service.run, body.top)
    return await _respond(service, request, _Asked(body, prompts, questions, spec, format, chat=False))


def _chat_prompt(service: Service, turns: AnyQuestion) -> Prompt:
    question, templates = question_from(turns), service.run.model.templates
    check_conversations(templates, [question])
    return templates.reply_prompt(question)


def _raw_prompt(service: Service, prompt: str | list[int]) -> Prompt:
    """Return a prompt as it is; an end token that the tokenizer appends is removed, because nothing continues it."""
    tokenizer = service.run.model.templates.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        return Prompt(tuple(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids))
    if max(prompt) >= (size := service.run.model.backbone.output_head.vocabulary):
        raise ApiError(
            400, f"prompt has the token {max(prompt)}; the model has {size:,} tokens", "invalid_value", param="prompt"
        )
    return Prompt(tuple(prompt))


def _decoded(service: Service, ids: list[int]) -> str:
    return str(service.run.model.templates.tokenizer.decode(ids))


def _spec(
    service: Service, body: ChatBody | CompletionBody, role: str, prompts: Sequence[Prompt], limits: Sequence[int]
) -> Spec:
    for name in ("n", "best_of"):
        service.check_count(name, getattr(body, name) or 1, service.limits.n, "--max-n")
    if body.best_of is not None:
        service.check_scorer(None)
    service.check_count("replies to all prompts", len(prompts) * body.sampled, service.limits.rows, "--queue")
    requests = [
        RolloutRequest(
            prompt,
            temperature=_temperature(body.temperature),
            top_p=1.0 if body.top_p is None else body.top_p,
            # The number of the choice: a reply does not depend on the other prompts of the request.
            stream=index,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            stop_strings=body.stop_strings,
        )
        for prompt in prompts
        for index in range(body.sampled)
    ]
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    return Spec(
        role, requests, seed, [limit for limit in limits for _ in range(body.sampled)], body.top, isinstance(body, ChatBody)
    )


def _temperature(value: float | None) -> float:
    """Return the temperature; a tiny one, whose logits could be infinite, is greedy."""
    return 1.0 if value is None else value if value >= _COLDEST else 0.0


async def _respond(service: Service, request: Request, asked: _Asked) -> Response:
    if asked.body.stream:
        return StreamingResponse(await _started(service, request, asked), media_type="text/event-stream")
    with service.admitted(rows=len(asked.spec.requests)):
        service.metrics.tokens.labels("prompt").inc(asked.prompt_tokens)
        return await unless_gone(request, _whole(service, asked))


def _reply_text(service: Service, asked: _Asked, index: int) -> ReplyText:
    spec, request = asked.spec, asked.spec.requests[index]
    return ReplyText(
        service.run, request.prompt, spec.limits[index], request.stop_strings, chat=asked.chat, with_tokens=spec.top is not None
    )


# -- whole responses ----------------------------------------------------------------------------------------------------


async def _whole(service: Service, asked: _Asked) -> Response:
    replies = await replies_to(service.worker, asked.spec)
    completion = sum(len(reply.ended.ids) for reply in replies)
    service.metrics.tokens.labels("completion").inc(completion)
    # In other threads: the log-probs of many tokens take seconds, in which the loop would answer nobody.
    texts = await asyncio.to_thread(_texts, service, asked, replies)
    extras: list[dict[str, Any]] = [{} for _ in texts]
    order = list(range(len(texts)))
    if asked.body.best_of is not None:
        order, extras = await _ranked(service, asked, [piece.text for _, piece in texts])

    def response() -> JSONResponse:
        choices = [
            {**asked.format.choice(*texts[i]), "index": index, "finish_reason": texts[i][0].finish_reason, **extras[i]}
            for index, i in enumerate(order)
        ]
        head = _head(service, asked, asked.format.kind)
        return JSONResponse({**head, "choices": choices, "usage": _usage(asked, completion)})

    return await asyncio.to_thread(response)


def _texts(service: Service, asked: _Asked, replies: Sequence[SampledReply]) -> list[tuple[ReplyText, Piece]]:
    texts: list[tuple[ReplyText, Piece]] = []
    for index, reply in enumerate(replies):
        text = _reply_text(service, asked, index)
        if reply.ids:
            text.reply = reply
        texts.append((text, text.end(reply.ended)))
    return texts


async def _ranked(service: Service, asked: _Asked, texts: Sequence[str]) -> tuple[list[int], list[dict[str, Any]]]:
    """Rank the replies to each prompt by the evaluator.

    Returns:
        Indices of the best n replies to each prompt, the best first; and for every reply its score and confidence, None for a
        reply without text, which is ranked last.
    """
    evaluator = service.check_scorer(None)
    owners = [index // asked.body.sampled for index in range(len(texts))]
    scored = [index for index, text in enumerate(texts) if text.strip()]
    scores = await service.scores([asked.questions[owners[i]] for i in scored], [texts[i] for i in scored])
    known = dict(zip(scored, scores, strict=True))
    order: list[int] = []
    extras: list[dict[str, Any]] = [
        {"score": round(known[index], DIGITS) if index in known else None, "confidence": None} for index in range(len(texts))
    ]
    for owner in range(len(asked.prompts)):
        mine = [index for index in range(len(texts)) if owners[index] == owner]
        ranked = [index for index in mine if index in known]
        if len(ranked) > 1:
            for index, confidence in zip(ranked, evaluator.confidences([known[i] for i in ranked]), strict=True):
                extras[index]["confidence"] = round(confidence, DIGITS)
        order += sorted(mine, key=lambda index: (index not in known, -known.get(index, 0.0)))[: asked.body.choices]
    return order, extras


def _head(service: Service, asked: _Asked, kind: str) -> dict[str, Any]:
    return {
        "id": asked.format.prefix + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": asked.body.model,
        "system_fingerprint": f"fp_{service.run.model.backbone.fingerprint}",
    }


def _usage(asked: _Asked, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": asked.prompt_tokens + completion,
    }


# -- streams ------------------------------------------------------------------------------------------------------------


async def _started(service: Service, request: Request, asked: _Asked) -> AsyncIterator[str]:
    """Return the lines of a stream; an error before its first line, such as a full queue, is a response with a status."""
    lines = _lines(service, asked)
    first = await unless_gone(request, anext(lines))

    async def all_lines() -> AsyncIterator[str]:
        try:
            yield first
            async for line in lines:
                yield line
        finally:
            # At once, not when the generator is collected: it holds the places of its replies.
            await lines.aclose()

    return all_lines()


async def _lines(service: Service, asked: _Asked) -> AsyncGenerator[str, None]:
    with service.admitted(rows=len(asked.spec.requests)):
        service.metrics.tokens.labels("prompt").inc(asked.prompt_tokens)
        head, begun, is_first = _head(service, asked, asked.format.chunk_kind), time.monotonic(), True
        texts = [_reply_text(service, asked, index) for index in range(len(asked.spec.requests))]
        with sampled(service.worker, asked.spec, tokens=True) as events:
            try:
                async for event in events:
                    if is_first:
                        service.metrics.first_token_seconds.observe(time.monotonic() - begun)
                        for index in range(len(texts)):
                            if (choice := asked.format.first()) is not None:
                                yield _line(asked, head, index, choice)
                        is_first = False
                    for line in _lines_of(asked, head, event, texts[event.index]):
                        yield line
            except Exception as error:
                if is_first:
                    raise
                yield f"data: {json.dumps(api_error_from(error).body)}\n\n"
                return
            finally:  # also if the client has left
                service.metrics.tokens.labels("completion").inc(sum(len(text.reply.ids) for text in texts))
        usage = _usage(asked, sum(len(text.reply.ended.ids) for text in texts))
        if asked.body.includes_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _lines_of(asked: _Asked, head: dict[str, Any], event: Event, text: ReplyText) -> list[str]:
    """Return the lines that an event adds to a stream."""
    piece = text.add(event.token) if event.token is not None else Piece("")
    if event.rollout is not None:
        piece = text.end(event.rollout)
    lines = []
    if piece.text or piece.tokens:
        lines.append(_line(asked, head, event.index, asked.format.part(text, piece)))
    if event.rollout is not None:
        lines.append(_line(asked, head, event.index, {**asked.format.last(), "finish_reason": text.finish_reason}))
    return lines


def _line(asked: _Asked, head: dict[str, Any], index: int, choice: dict[str, Any]) -> str:
    usage = {"usage": None} if asked.body.includes_usage else {}
    return f"data: {json.dumps({**head, 'choices': [{'index': index, 'finish_reason': None, **choice}], **usage})}\n\n"
