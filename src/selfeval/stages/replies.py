"""replies: sample answers to every question.

Training questions get diverse replies: each has its own temperature and nucleus, and some come from beam search. Test
questions get plain samples at temperature 1, because they measure the model as it is.

In a later round the previous round's policy replies. Reference answers still come from the bare base, and those of the test
questions are round 1's.

With a file of replies or pairs (`stages/given.py`) its replies are used, and only the test questions get one sample each.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.records import Question, Reply, Split, Working
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.stages.context import Context
from selfeval.stages.given import Given

__all__ = ["run"]


def _request(context: Context, question: Question, number: int) -> Request:
    prompt = context.templates.prompt("reply", question=question.text)
    if question.split == Split.TEST:
        return Request(prompt)
    rng, config = context.random("replies", question.id, number), context.config.replies
    return Request(prompt, rng.uniform(*config.temperature), rng.uniform(*config.top_p))


def _reply(context: Context, question: Question, number: int, request: Request, rollout: Rollout, way: str) -> Reply:
    return Reply(
        id=f"{question.id}-r{number}",
        question_id=question.id,
        text=context.templates.text(rollout.ids),
        ids=rollout.ids,
        way=way,
        temperature=round(request.temperature, 4),
        top_p=round(request.top_p, 4),
        logprob=round(sum(rollout.logprobs), 4),
        finished=rollout.finished,
    )


def _sampled(context: Context, shard: int, asked: Sequence[tuple[Question, int]]) -> list[Reply]:
    requests = [_request(context, question, number) for question, number in asked]
    rollouts = generate(
        context.backbone,
        requests,
        max_new_tokens=context.config.replies.max_new_tokens,
        seed=context.seed("replies", shard),
        rows=context.config.rollout_rows,
    )
    return [_reply(context, q, n, request, r, "sample") for (q, n), request, r in zip(asked, requests, rollouts, strict=True)]


def _beamed(context: Context, asked: Sequence[tuple[Question, int]]) -> list[Reply]:
    config = context.config.replies
    requests = [Request(context.templates.prompt("reply", question=q.text)) for q, _ in asked]
    prompts = [r.prompt for r in requests]
    rollouts = beam_search(
        context.backbone,
        prompts,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        rows=context.config.rollout_rows,
        batch_tokens=context.config.batch_tokens,
    )
    return [_reply(context, q, n, request, r, "beam") for (q, n), request, r in zip(asked, requests, rollouts, strict=True)]


def _workings(context: Context, questions: Sequence[Question]) -> list[Working]:
    """Generate the base's greedy reply to each question: its reference answer."""
    with context.backbone.acting_as(BASE):
        rollouts = generate(
            context.backbone,
            [Request(context.templates.prompt("reply", question=q.text), temperature=0.0) for q in questions],
            max_new_tokens=context.config.replies.max_new_tokens,
            seed=0,
            rows=context.config.rollout_rows,
        )
    return [Working(q.id, context.templates.text(r.ids)) for q, r in zip(questions, rollouts, strict=True)]


def _asked(context: Context, questions: Sequence[Question]) -> tuple[list[tuple[Question, int]], list[tuple[Question, int]]]:
    """Return the replies to sample and those to generate by beam search, each as its question and number.

    With the user's own replies, only one reply per test question is sampled, to compare the policy with.
    """
    config = context.config.replies
    if context.given and context.given.replies:
        return [(q, 0) for q in questions if q.split == Split.TEST], []
    last = config.per_question - 1
    beamed = [
        (q, last) for q in questions
        if q.split == Split.TRAIN and context.random("beam", q.id).random() < config.beam_share
    ]  # fmt: skip
    taken = {q.id for q, _ in beamed}
    return [(q, n) for q in questions for n in range(config.per_question) if not (n == last and q.id in taken)], beamed


def _typed(context: Context, given: Given, questions: Sequence[Question]) -> list[Reply]:
    """Return the user's replies with their log-probs under the start role, without those too long for its context.

    Their token ids are those under which any text is scored, including the end-of-sequence token.
    """
    end = context.backbone.loaded.eos_ids[:1]
    texts = [(q, n, text) for q in questions for n, text in enumerate(given.replies.get(q.id, ()))]
    found = [(q, n, text, (*context.templates.reply_ids(text), *end)) for q, n, text in texts]
    found = [row for row in found if _fits(context, row[0], row[3])]
    prompts = [context.templates.prompt("reply", question=q.text) for q, _, _, _ in found]
    logprobs = reply_logprobs(context.backbone, prompts, [row[3] for row in found], batch_tokens=context.config.batch_tokens)
    return [
        Reply(f"{q.id}-f{n}", q.id, text, ids, "file", 1.0, 1.0, round(sum(values), 4), finished=True)
        for (q, n, text, ids), values in zip(found, logprobs, strict=True)
    ]


def _fits(context: Context, question: Question, ids: Sequence[int]) -> bool:
    """Return whether prompt, reference answer (if the prompt has one) and reply fit the evaluator's context."""
    length = context.backbone.loaded.context_length
    working = context.config.replies.max_new_tokens if context.templates.grades_with_working else 0
    prompt = context.templates.prompt("grade", question=question.text, working="")
    return length is None or len(prompt.ids) + working + len(ids) <= length


def _write_shard(context: Context, shard: int, questions: Sequence[Question]) -> None:
    sampled, beamed = _asked(context, questions)
    with context.backbone.acting_as(context.ensure_start()):
        replies = _sampled(context, shard, sampled) if sampled else []
        if beamed:
            replies += _beamed(context, beamed)
        if context.given:
            replies += _typed(context, context.given, questions)
    if context.templates.grades_with_working:
        known = {w.question_id for w in context.first.read("workings", Working)} if context.earlier else set()
        context.store.write_shard("workings", shard, _workings(context, [q for q in questions if q.id not in known]))
    context.store.write_shard("replies", shard, sorted(replies, key=lambda r: r.id))


def run(context: Context) -> dict[str, int]:
    """Write the replies to all questions; return counts."""
    questions, size = context.store.read("questions", Question), context.config.replies.shard
    shards = [questions[i : i + size] for i in range(0, len(questions), size)]
    needed = ("replies", "workings") if context.templates.grades_with_working else ("replies",)
    finished = [i for i in range(len(shards)) if all(context.store.has_shard(kind, i) for kind in needed)]
    with context.terminal.bar("replies", len(questions), sum(len(shards[i]) for i in finished)) as bar:
        for index, shard in enumerate(shards):
            if index not in finished:
                _write_shard(context, index, shard)
                bar.advance(len(shard))
    replies = context.store.read("replies", Reply)
    wanted = sum(map(len, context.given.replies.values())) if context.given else 0
    if missing := wanted - sum(r.way == "file" for r in replies):
        context.terminal.note(f"replies: {missing} of {wanted} in the file are too long for this model's context and left out")
    return {
        "replies": len(replies),
        "beam": sum(r.way == "beam" for r in replies),
        "unfinished": sum(not r.finished for r in replies),
    }
