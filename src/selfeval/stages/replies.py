"""replies: sample answers to every question.

Training questions get diverse replies: each has its own temperature and nucleus, and some come from beam search. Test
questions get plain samples (`evaluation.temperature`, default 1), because they measure the model as it is.

In a later round the previous round's policy replies. Reference answers still come from the bare base, and those of the test
questions are round 1's.

With a file of replies or pairs (`stages/given.py`) its replies are used, and only the test questions get one sample each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import RepliesConfig
from selfeval.records import Question, ReferenceAnswer, Reply, Split
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, StageShards, map_shards

__all__ = ["Asked", "WriteReplies", "run"]

Numbered = tuple[Question, int]
"""A question and the number of a reply to it."""


@dataclass(frozen=True)
class Asked:
    """A question to reply to.

    Attributes:
        question: the question.
        typed: the user's own replies. Default: none.
        reference_answer: whether a reference answer is generated too. Default: False.
    """

    question: Question
    typed: tuple[str, ...] = ()
    reference_answer: bool = False


@dataclass(frozen=True)
class WriteReplies:
    """Work of the stage: reply to the questions of a shard.

    Attributes:
        config: settings of the stage.
        batch_size: batch size of the sampling.
        batch_tokens: batch size of the scoring, in tokens.
        draws: random numbers of the round.
        brought: whether the user's own replies are used; then each test question gets one sample, to compare the policy with.
        test_temperature, test_top_p: temperature and nucleus of the replies to test questions. Default: 1.
    """

    config: RepliesConfig
    batch_size: int
    batch_tokens: int
    draws: Draws
    brought: bool = False
    test_temperature: float = 1.0
    test_top_p: float = 1.0

    def __call__(self, model: ModelHandle, batch: Batch[Asked]) -> ShardOutput:
        """Return the replies under the start role, and the reference answers of the base if the evaluator reads them."""
        # Beam search is deterministic, so it gets at most one reply per question: the last number.
        sampled, beamed = self._numbered([asked.question for asked in batch.records])
        with model.backbone.acting_as(model.start()):
            replies = self._sampled(model, batch.index, sampled) if sampled else []
            if beamed:
                replies += self._beamed(model, beamed)
            replies += self._typed(model, batch.records)
        records = sorted(replies, key=lambda r: r.id)
        if not model.templates.grades_with_reference_answer:
            return ShardOutput(records)
        return ShardOutput(records, others={"reference_answers": self._reference_answers(model, batch.records)})

    def _numbered(self, questions: Sequence[Question]) -> tuple[list[Numbered], list[Numbered]]:
        """Return the replies to sample and those to generate by beam search."""
        if self.brought:
            return [(q, 0) for q in questions if q.split == Split.TEST], []
        last = self.config.per_question - 1
        beamed = [
            (q, last) for q in questions
            if q.split == Split.TRAIN and self.draws.random("beam", q.id).random() < self.config.beam_share
        ]  # fmt: skip
        taken = {q.id for q, _ in beamed}
        numbers = range(self.config.per_question)
        return [(q, n) for q in questions for n in numbers if not (n == last and q.id in taken)], beamed

    def _sampled(self, model: ModelHandle, shard: int, numbered: Sequence[Numbered]) -> list[Reply]:
        requests = [self._request(model, question, number) for question, number in numbered]
        rollouts = generate(
            model.backbone,
            requests,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.draws.seed("replies", shard),
            batch_size=self.batch_size,
        )
        return [
            _reply(model, asked, request, rollout, "sample")
            for asked, request, rollout in zip(numbered, requests, rollouts, strict=True)
        ]

    def _request(self, model: ModelHandle, question: Question, number: int) -> Request:
        prompt = model.templates.prompt("reply", question=question.text)
        if question.split == Split.TEST:
            return Request(prompt, self.test_temperature, self.test_top_p)
        rng = self.draws.random("replies", question.id, number)
        # Named by question and reply, not by shard: another shard size draws the same temperatures.
        return Request(prompt, rng.uniform(*self.config.temperature), rng.uniform(*self.config.top_p))

    def _beamed(self, model: ModelHandle, numbered: Sequence[Numbered]) -> list[Reply]:
        requests = [Request(model.templates.prompt("reply", question=q.text)) for q, _ in numbered]
        rollouts = beam_search(
            model.backbone,
            [r.prompt for r in requests],
            beams=self.config.beams,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
        )
        return [
            _reply(model, asked, request, rollout, "beam")
            for asked, request, rollout in zip(numbered, requests, rollouts, strict=True)
        ]

    def _typed(self, model: ModelHandle, asked: Sequence[Asked]) -> list[Reply]:
        """Return the user's replies with their log-probs, without those too long for the model's context.

        Their token ids are those under which any text is scored, including the end-of-sequence token.
        """
        # A finished sample ends with this token, and the evaluator's score is read there.
        end = model.backbone.loaded.eos_ids[:1]
        texts = [(one.question, n, text) for one in asked for n, text in enumerate(one.typed)]
        found = [(q, n, text, (*model.templates.reply_ids(text), *end)) for q, n, text in texts]
        found = [row for row in found if self._fits(model, row[0], row[3])]
        if not found:
            return []
        prompts = [model.templates.prompt("reply", question=q.text) for q, _, _, _ in found]
        logprobs = reply_logprobs(model.backbone, prompts, [row[3] for row in found], batch_tokens=self.batch_tokens)
        return [
            Reply(f"{q.id}-f{n}", q.id, text, ids, "file", 1.0, 1.0, round(sum(values), 4), finished=True)
            for (q, n, text, ids), values in zip(found, logprobs, strict=True)
        ]

    def _fits(self, model: ModelHandle, question: Question, ids: Sequence[int]) -> bool:
        """Return whether the reply fits the context after its own prompt, and after the evaluator's with a reference answer."""
        length = model.backbone.loaded.context_length
        # The reference answer does not exist yet, so its maximum length is assumed.
        reference_answer = self.config.max_new_tokens if model.templates.grades_with_reference_answer else 0
        grade = model.templates.prompt("grade", question=question.text, reference_answer="")
        reply = model.templates.prompt("reply", question=question.text)
        return length is None or max(len(grade.ids) + reference_answer, len(reply.ids)) + len(ids) <= length

    def _reference_answers(self, model: ModelHandle, asked: Sequence[Asked]) -> list[ReferenceAnswer]:
        """Generate the base's greedy reply to each question: its reference answer."""
        questions = [one.question for one in asked if one.reference_answer]
        with model.backbone.acting_as(BASE):
            rollouts = generate(
                model.backbone,
                [Request(model.templates.prompt("reply", question=q.text), temperature=0.0) for q in questions],
                max_new_tokens=self.config.max_new_tokens,
                seed=0,
                batch_size=self.batch_size,
            )
        return [ReferenceAnswer(q.id, model.templates.text(r.ids)) for q, r in zip(questions, rollouts, strict=True)]


def _reply(model: ModelHandle, asked: Numbered, request: Request, rollout: Rollout, sampling_method: str) -> Reply:
    question, number = asked
    return Reply(
        id=f"{question.id}-r{number}",
        question_id=question.id,
        text=model.templates.text(rollout.ids),
        ids=rollout.ids,
        sampling_method=sampling_method,
        temperature=round(request.temperature, 4),
        top_p=round(request.top_p, 4),
        logprob=round(sum(rollout.logprobs), 4),
        finished=rollout.finished,
    )


def run(context: Context) -> dict[str, int]:
    """Write the replies to all questions; return counts."""
    config, typed = context.config, context.given.replies if context.given else {}
    work = WriteReplies(
        *(config.replies, config.backbone.rollout_batch_size, config.backbone.batch_tokens, context.draws),
        brought=bool(typed),
        test_temperature=config.evaluation.temperature,
        test_top_p=config.evaluation.top_p,
    )
    others = ("reference_answers",) if context.templates.grades_with_reference_answer else ()
    shards = StageShards(context.store, context.terminal, "replies", others=others)
    # Test questions have reference answers since round 1.
    known = {w.question_id for w in context.first.read("reference_answers", ReferenceAnswer)} if context.earlier else set()
    questions = context.store.read("questions", Question)
    asked = [Asked(q, tuple(typed.get(q.id, ())), reference_answer=q.id not in known) for q in questions]
    map_shards(shards, asked, config.replies.shard, work, context.executor)
    replies = context.store.read("replies", Reply)
    wanted = sum(map(len, context.given.replies.values())) if context.given else 0
    if missing := wanted - sum(r.sampling_method == "file" for r in replies):
        context.terminal.note(
            f"replies: {missing} of {wanted} in the file are too long for this model's context and are skipped"
        )
    return {
        "replies": len(replies),
        "beam": sum(r.sampling_method == "beam" for r in replies),
        "unfinished": sum(not r.finished for r in replies),
    }
