"""replies: sample answers to every question.

Training questions get diverse replies: each has its own temperature and nucleus, and some come from beam search. Test
questions get plain samples (`evaluation.temperature`, default 1), because they measure the model as it is.

In a later round the previous round's policy replies. Reference answers still come from the bare base, and those of the test
questions are round 1's.

With `replies.max_new_tokens = "auto"`, the first shard is sampled with the cap and decides the limit (`runs/reply_limit.py`).
Its replies are then cut there. The random numbers of a sample do not depend on its limit, so these are the samples that the
limit would have given. A beam search depends on its limit, so every shard searches with the cap and cuts the result. All
shards have the same distribution.

A reply to a training question, sampled or of a beam search, that repeats itself until the limit (`quality/reply_loops.py`) is
listed among the drops, and is not judged. Replies to test questions are never dropped, because the evaluation would no longer
measure the model as it is. Dropped replies stay in the shard: the share of replies that were cut off counts them.

With a file of replies or pairs (`stages/given.py`) its replies are used, and only the test questions get one sample each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import RepliesConfig
from selfeval.errors import LoopError
from selfeval.quality.reply_diversity import measure_diversity
from selfeval.quality.reply_loops import Loop, find_loop
from selfeval.records import Drop, Question, ReferenceAnswer, Reply, Split
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import visible_ids
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.stop_strings import before_stop
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.runs.reply_limit import LIMIT_FILE, ReplyLimit, decide_limit, read_limit
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, StageShards, computed, counting, map_shards

__all__ = ["Asked", "WriteReplies", "run", "texts_of_training_questions"]

Numbered = tuple[Question, int]
"""A question and the number of a reply to it."""

_DECIDED = "reply_limit"
"""Name under which the work of the first shard returns the limit that it decided."""

_SHORTEST_CAP = 64
"""Smallest cap to which a long question may lower a larger one for all replies."""


@dataclass(frozen=True)
class _Written:
    """A reply of the model: whose it is, how it was requested, and what was generated."""

    asked: Numbered
    request: Request
    rollout: Rollout
    sampling_method: str


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
        limit: token limit of the replies, or the cap if `decides`.
        decides: whether the limit is decided from this shard. Default: False.
        searched: Optional. Token limit of the beam search, whose replies are cut at `limit`. Default: `limit`.
        brought: whether the user's own replies are used; then each test question gets one sample, to compare the policy with.
        test_temperature, test_top_p: temperature and nucleus of the replies to test questions. Default: 1.
    """

    config: RepliesConfig
    batch_size: int
    batch_tokens: int
    draws: Draws
    limit: int
    decides: bool = False
    searched: int | None = None
    brought: bool = False
    test_temperature: float = 1.0
    test_top_p: float = 1.0

    def __call__(self, model: ModelHandle, batch: Batch[Asked]) -> ShardOutput:
        """Return the replies under the start role, and the reference answers of the base if the evaluator reads them."""
        # Beam search is deterministic, so it gets at most one reply per question: the last number.
        sampled, beamed = self._numbered([asked.question for asked in batch.records])
        answers = sum(one.reference_answer for one in batch.records) if model.templates.grades_with_reference_answer else 0
        advance = counting(model.report_progress, len(sampled) + len(beamed) + answers)
        with model.backbone.acting_as(model.start()):
            written = self._sampled(model, batch.index, sampled, advance) if sampled else []
            if beamed:
                written += self._beamed(model, beamed)
                advance(len(beamed))
        if self.decides:
            lengths = [self._limited_length(one.rollout) for one in written if one.rollout.finished]
            decided = decide_limit(lengths, len(written), self.limit)
            output = replace(self, limit=decided.tokens)._output(model, batch.records, written, advance)
            return replace(output, others={**output.others, _DECIDED: [decided]})
        return self._output(model, batch.records, written, advance)

    def _output(
        self, model: ModelHandle, asked: Sequence[Asked], written: Sequence[_Written], advance: Callable[[int], None]
    ) -> ShardOutput:
        thinking = self._thinking(model)
        limited = [replace(one, rollout=one.rollout.within(self.limit, one.request.prompt, thinking)) for one in written]
        # After the limit: it applies to the tokens that were sampled, the stop string among them.
        ended = [
            replace(one, rollout=before_stop(one.rollout, one.request.stop_strings, model.backbone.loaded)) for one in limited
        ]
        replies = [_reply(model, one) for one in ended]
        with model.backbone.acting_as(model.start()):
            replies += self._typed(model, asked)
        records = sorted(replies, key=lambda r: r.id)
        drops = self._loops({one.question.id: one.question for one in asked}, records)
        if not model.templates.grades_with_reference_answer:
            return ShardOutput(records, drops)
        return ShardOutput(records, drops, others={"reference_answers": self._reference_answers(model, asked, advance)})

    def _loops(self, questions: Mapping[str, Question], replies: Sequence[Reply]) -> list[Drop]:
        """Return a drop for each sampled reply to a training question that repeats itself until the limit."""
        if self.config.loops == "keep":
            return []
        sampled = [r for r in replies if questions[r.question_id].split == Split.TRAIN and r.sampling_method != "file"]
        found = [(reply, find_loop(reply.ids, finished=reply.finished)) for reply in sampled]
        return [_loop_drop(questions[r.question_id], r, loop) for r, loop in found if loop is not None]

    def _thinking(self, model: ModelHandle) -> ThinkingTokens | None:
        return model.templates.thinking(self.config.max_thinking_tokens)

    def _limited_length(self, rollout: Rollout) -> int:
        """Return the number of tokens to which the limit of a reply applies."""
        return len(rollout.ids if self.config.max_thinking_tokens is None else rollout.reply_ids)

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

    def _sampled(
        self, model: ModelHandle, shard: int, numbered: Sequence[Numbered], advance: Callable[[int], None]
    ) -> list[_Written]:
        requests = [self._request(model, question, number) for question, number in numbered]
        rollouts = model.engine.generate(
            model.backbone,
            requests,
            max_new_tokens=self.limit,
            seed=self.draws.seed("replies", shard),
            batch_size=self.batch_size,
            thinking=self._thinking(model),
            advance=advance,
        )
        return [_Written(*row, "sample") for row in zip(numbered, requests, rollouts, strict=True)]

    def _request(self, model: ModelHandle, question: Question, number: int) -> Request:
        prompt = model.templates.reply_prompt(question)
        if question.split == Split.TEST:
            return Request(prompt, self.test_temperature, self.test_top_p)
        rng = self.draws.random("replies", question.id, number)
        # Named by question and reply, not by shard: another shard size draws the same temperatures.
        return Request(
            prompt,
            rng.uniform(*self.config.temperature),
            rng.uniform(*self.config.top_p),
            top_k=self.config.top_k,
            min_p=self.config.min_p,
            repetition_penalty=self.config.repetition_penalty,
            stop_strings=self.config.stop_strings,
        )

    def _beamed(self, model: ModelHandle, numbered: Sequence[Numbered]) -> list[_Written]:
        requests = [Request(model.templates.reply_prompt(q)) for q, _ in numbered]
        rollouts = beam_search(
            model.backbone,
            [r.prompt for r in requests],
            beams=self.config.beams,
            # One limit for all tokens; `_output` applies those of thinking and reply.
            max_new_tokens=(self.searched or self.limit) + (self.config.max_thinking_tokens or 0),
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
        )
        return [_Written(*row, "beam") for row in zip(numbered, requests, rollouts, strict=True)]

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
        prompts = [model.templates.reply_prompt(q) for q, _, _, _ in found]
        logprobs = reply_logprobs(model.backbone, prompts, [row[3] for row in found], batch_tokens=self.batch_tokens)
        return [
            Reply(f"{q.id}-f{n}", q.id, text, ids, "file", 1.0, 1.0, round(sum(values), 4), finished=True)
            for (q, n, text, ids), values in zip(found, logprobs, strict=True)
        ]

    def _fits(self, model: ModelHandle, question: Question, ids: Sequence[int]) -> bool:
        """Return whether the reply fits the context after its own prompt, and after the evaluator's with a reference answer."""
        length = model.backbone.loaded.context_length
        # The reference answer does not exist yet, so its maximum length is assumed.
        reference_answer = self.limit if model.templates.grades_with_reference_answer else 0
        grade = model.templates.prompt("grade", question=question.text, reference_answer="")
        reply = model.templates.reply_prompt(question)
        return length is None or max(len(grade.ids) + reference_answer, len(reply.ids)) + len(ids) <= length

    def _reference_answers(
        self, model: ModelHandle, asked: Sequence[Asked], advance: Callable[[int], None]
    ) -> list[ReferenceAnswer]:
        """Generate the base's greedy reply to each question: its reference answer."""
        questions = [one.question for one in asked if one.reference_answer]
        with model.backbone.acting_as(BASE):
            rollouts = model.engine.generate(
                model.backbone,
                [Request(model.templates.reply_prompt(q), temperature=0.0) for q in questions],
                max_new_tokens=self.limit,
                seed=0,
                batch_size=self.batch_size,
                thinking=self._thinking(model),
                advance=advance,
            )
        return [ReferenceAnswer(q.id, model.templates.text(r.reply_ids)) for q, r in zip(questions, rollouts, strict=True)]


def _reply(model: ModelHandle, written: _Written) -> Reply:
    (question, number), request, rollout = written.asked, written.request, written.rollout
    return Reply(
        id=f"{question.id}-r{number}",
        question_id=question.id,
        text=model.templates.text(rollout.reply_ids),
        ids=visible_ids(model.backbone, rollout),
        sampling_method=written.sampling_method,
        temperature=round(request.temperature, 4),
        top_p=round(request.top_p, 4),
        logprob=round(sum(rollout.logprobs[rollout.hidden :]), 4),
        finished=rollout.finished,
        thinking=model.templates.thinking_text(rollout.thinking_ids),
    )


def _loop_drop(question: Question, reply: Reply, loop: Loop) -> Drop:
    detail = {
        "question": question.text,
        "reply": reply.id,
        "block": loop.block,
        "repeated": loop.tokens,
        "tokens": len(reply.ids),
    }
    return Drop("replies", "loop", reply.text, detail)


def _check_thinking(context: Context, replies: Sequence[Reply]) -> None:
    """Refuse replies of which most were cut off inside their reasoning: they have no text to compare.

    Raises:
        LoopError: see above, unless the user forces the run.
    """
    lost = sum(bool(reply.thinking) and not reply.text and not reply.finished for reply in replies)
    if 2 * lost <= len(replies) or context.force:
        return
    limit = context.config.replies.max_thinking_tokens
    raising = f"raise replies.max_thinking_tokens (now {limit})" if limit else "set replies.max_thinking_tokens, such as 1024"
    raise LoopError(
        f"{lost} of {len(replies)} replies were cut off inside their reasoning and have no text to judge; {raising}, or "
        "disable the thinking if the chat template can, for example with chat.arguments = { enable_thinking = false }"
    )


def _decided(context: Context, shards: StageShards, asked: Sequence[Asked], work: WriteReplies) -> ReplyLimit:
    """Return the limit of the run, and decide it from the first shard if that has not been done: once, whatever is resumed."""
    root = context.store.root
    if not (root / LIMIT_FILE).is_file():
        if context.earlier:
            _write_limit(context, read_limit(context.first.root))
        else:
            deciding = replace(work, limit=_cap(context, [one.question for one in asked]), decides=True)
            first = Batch(0, asked[: work.config.shard])
            with context.terminal.bar(shards.name, len(asked)) as bar:
                for batch, output in computed(context.executor, deciding, [first], bar):
                    (limit,) = output.others[_DECIDED]
                    # Before the shard: a kill between the two leaves the limit, with which the shard is sampled again.
                    _write_limit(context, limit)
                    shards.write(batch.index, output)
    limit = read_limit(root)
    context.terminal.note(f"replies: the limit is {limit.sentence}")
    return limit


def _write_limit(context: Context, limit: ReplyLimit) -> None:
    context.store.write_json(context.store.root / LIMIT_FILE, asdict(limit))


def _cap(context: Context, questions: Sequence[Question]) -> int:
    """Return the configured cap, lowered to what fits the model's context after the longest prompt of policy and evaluator.

    Raises:
        LoopError: a question leaves no room for a reply of `_SHORTEST_CAP` tokens.
    """
    cap = context.config.replies.max_new_tokens_cap
    if context.backbone.loaded.context_length is None:
        return cap
    room, question = min(((_room(context, q), q) for q in questions), key=lambda found: found[0])
    if room >= cap:
        return cap
    length, needed = len(context.templates.reply_prompt(question).ids), min(_SHORTEST_CAP, cap)
    if room < needed:
        raise LoopError(
            f"the prompt of question {question.id} has {length} tokens, which leaves no room for a reply of {needed} tokens in "
            f'this model\'s context of {context.backbone.loaded.context_length}, and replies.max_new_tokens = "auto" gives all '
            "replies the same limit; remove the question, or set replies.max_new_tokens to a number"
        )
    context.terminal.note(
        f"replies: the cap is lowered from {cap} to {room} tokens by the prompt of question {question.id} ({length} tokens); "
        "remove the question, or use a model with a longer context"
    )
    return room


def _room(context: Context, question: Question) -> int:
    """Return the number of tokens that are left in the context for a reply to the question, and for its score."""
    templates, length = context.templates, context.backbone.loaded.context_length
    assert length is not None
    left = length - (context.config.replies.max_thinking_tokens or 0)
    grade = templates.prompt("grade", question=question.text, reference_answer="")
    # A reference answer is as long as a reply, and is in the same prompt.
    texts = 2 if templates.grades_with_reference_answer else 1
    return min(left - len(templates.reply_prompt(question).ids), (left - len(grade.ids)) // texts)


def run(context: Context) -> dict[str, float]:
    """Write the replies to all questions; return counts."""
    config, typed = context.config, context.given.replies if context.given else {}
    work = WriteReplies(
        *(config.replies, config.backbone.rollout_batch_size, config.backbone.batch_tokens, context.draws),
        limit=config.replies.longest,
        brought=bool(typed),
        test_temperature=config.evaluation.temperature,
        test_top_p=config.evaluation.top_p,
    )
    others = ("reference_answers",) if context.templates.grades_with_reference_answer else ()
    shards = StageShards(context.store, context.terminal, "replies", drops=None, others=others, poisoned=config.scale.poisoned)
    # Test questions have reference answers since round 1.
    known = {w.question_id for w in context.first.read("reference_answers", ReferenceAnswer)} if context.earlier else set()
    questions = context.store.read("questions", Question)
    asked = [Asked(q, tuple(typed.get(q.id, ())), reference_answer=q.id not in known) for q in questions]
    if config.replies.max_new_tokens == "auto":
        decision = _decided(context, shards, asked, work)
        work = replace(work, limit=decision.tokens, searched=decision.cap)
    map_shards(shards, asked, config.replies.shard, work, context.executor)
    replies = context.store.read("replies", Reply)
    wanted = sum(map(len, context.given.replies.values())) if context.given else 0
    if missing := wanted - sum(r.sampling_method == "file" for r in replies):
        context.terminal.note(
            f"replies: {missing} of {wanted} in the file are too long for this model's context and are skipped"
        )
    _check_thinking(context, replies)
    drops = Counter(drop.reason for drop in context.store.read_dropped("replies"))
    decided = {"limit": work.limit} if config.replies.max_new_tokens == "auto" else {}
    return {
        **decided,
        "replies": len(replies),
        "beam": sum(r.sampling_method == "beam" for r in replies),
        "unfinished": sum(not r.finished for r in replies),
        **{f"dropped_{reason}": count for reason, count in sorted(drops.items())},
        **_diversity(questions, replies),
    }


def _diversity(questions: Sequence[Question], replies: Sequence[Reply]) -> dict[str, float]:
    """Return how much the replies to the same training question differ; empty if none has two replies."""
    return measure_diversity(texts_of_training_questions(questions, replies)).means()


def texts_of_training_questions(questions: Iterable[Question], replies: Iterable[Reply]) -> list[list[str]]:
    """Return the texts of the replies to each training question."""
    texts: dict[str, list[str]] = {q.id: [] for q in questions if q.split == Split.TRAIN}
    for reply in replies:
        if reply.question_id in texts:
            texts[reply.question_id].append(reply.text)
    return list(texts.values())
