"""steps: label the steps of replies by completing them, and train the step evaluator on the labels.

Runs only with `steps.enabled`. It labels replies to training questions. The reference is the answer of most replies that it
samples to a question, never gold; a question without a majority is dropped. The model that completes is the one that wrote the
replies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import AdamW

from selfeval.backbone.role_files import load_role, save_role
from selfeval.config import StepsConfig
from selfeval.errors import LoopError
from selfeval.judging.step_labels import SteppedReply, complete_steps, step_label
from selfeval.judging.steps import step_ends
from selfeval.judging.voting import Ballot, Voter, majority_of
from selfeval.records import Drop, Question, Reply, Split, StepLabels
from selfeval.stages.context import Context
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, StageShards, map_shards
from selfeval.stages.terminal import Bar
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.step_evaluator import STEP_EVALUATOR, LabelledReply, train_step_evaluator, training_steps

__all__ = ["LabelSteps", "ensure_step_evaluator", "run"]

Answered = tuple[Question, tuple[Reply, ...]]
"""A question with its replies."""


@dataclass(frozen=True)
class LabelSteps:
    """Work of the stage: label the replies to the questions of a shard.

    Attributes:
        config: settings of the stage.
        limit: maximum number of sampled tokens of a vote or a completion.
        batch_size: batch size of the sampling.
        seed: seed of votes and completions.
    """

    config: StepsConfig
    limit: int
    batch_size: int
    seed: int

    def __call__(self, model: ModelHandle, batch: Batch[Answered]) -> ShardOutput:
        """Return the labels of every reply; drop cut-off replies, and questions without a majority."""
        voter = Voter(
            model.backbone, model.templates, self.config, limit=self.limit, batch_size=self.batch_size, seed=self.seed
        )
        prompts = {question.id: model.templates.reply_prompt(question) for question, _ in batch.records}
        with model.backbone.acting_as(model.start()):
            votes = voter.hold({name: Ballot(prompt) for name, prompt in prompts.items()}, self.config.votes)
            majority = {name: majority_of(found, self.config.share) for name, found in votes.items()}
            kept = [(q, r) for q, replies in batch.records if majority[q.id] is not None for r in replies if r.finished]
            stepped = [self._stepped(model, voter, question, reply) for question, reply in kept]
            answers = complete_steps(voter, stepped, self.config.completions)
        labels = [
            StepLabels(
                question_id=question.id,
                reply_id=reply.id,
                reference=str(majority[question.id]),
                ends=steps.ends,
                reached=tuple(found.count(majority[question.id]) for found in of_reply),
                completions=self.config.completions,
            )
            for (question, reply), steps, of_reply in zip(kept, stepped, answers, strict=True)
        ]
        without = [Drop("steps", "no_majority", q.text) for q, _ in batch.records if majority[q.id] is None]
        cut = [Drop("steps", "unfinished", r.text) for _, replies in batch.records for r in replies if not r.finished]
        return ShardOutput(labels, [*without, *cut])

    def _stepped(self, model: ModelHandle, voter: Voter, question: Question, reply: Reply) -> SteppedReply:
        ends = step_ends(reply.ids, model.templates.tokenizer.decode, self.config.form, model.backbone.loaded.eos_ids)
        answer = voter.answer(reply.text, finished=True)
        return SteppedReply(question.id, model.templates.reply_prompt(question), reply.ids, ends, answer)


def ensure_step_evaluator(context: Context) -> str:
    """Load the trained step evaluator if needed, and return the name of its role."""
    if STEP_EVALUATOR not in context.backbone.roles.names:
        load_role(context.backbone, STEP_EVALUATOR, context.role_folder(STEP_EVALUATOR))
    return STEP_EVALUATOR


def run(context: Context) -> dict[str, Any]:
    """Label the steps, train and save the role `steps`; return counts.

    Raises:
        LoopError: replies were written after a chain of thought, or no reply could be labelled.
    """
    config = context.config
    work = LabelSteps(config.steps, context.reply_limit, config.backbone.rollout_batch_size, context.seed("steps"))
    shards = StageShards(context.store, context.terminal, "steps", drops=True, poisoned=config.scale.poisoned)
    map_shards(shards, _answered(context), config.steps.shard, work, context.executor)
    labels, drops = context.store.read("steps", StepLabels), context.store.read("dropped/steps", Drop)
    if not labels:
        raise LoopError(
            f"no step could be labelled: of {config.steps.questions} questions none has both a finished reply and a majority "
            f"answer in the form steps.answer = {config.steps.answer}; choose another form, raise replies.max_new_tokens or "
            "steps.questions, lower steps.share, or set steps.enabled = false"
        )
    context.train(_train)
    steps = sum(len(found.ends) for found in labels)
    return {"replies": len(labels), "steps": steps, **Counter(drop.reason for drop in drops)}


def _answered(context: Context) -> list[Answered]:
    replies: dict[str, list[Reply]] = defaultdict(list)
    for reply in context.replies().values():
        replies[reply.question_id].append(reply)
    questions = context.questions(Split.TRAIN)[: context.config.steps.questions]
    found = [(question, tuple(replies[question.id])) for question in questions]
    # A completion would begin with the reply alone, without the thinking that led to it.
    if any(reply.thinking for _, of_question in found for reply in of_question):
        raise LoopError(
            "the steps of replies that were written after a chain of thought cannot be labelled by completing them; set "
            "steps.enabled = false, or disable the thinking, for example with chat.arguments = { enable_thinking = false }"
        )
    return found


def _labelled(context: Context, labels: Sequence[StepLabels]) -> list[LabelledReply]:
    replies, questions = context.replies(), {q.id: q.text for q in context.questions(Split.TRAIN)}
    kind = context.config.steps.labels
    return [
        LabelledReply(
            context.grade_prompt(found.question_id, questions[found.question_id]),
            replies[found.reply_id].ids,
            found.ends,
            tuple(step_label(share, kind) for share in found.shares),
        )
        for found in labels
    ]


def _train(context: Context) -> dict[str, Any]:
    if context.has_role(STEP_EVALUATOR):
        return {}
    config, backbone = context.config, context.backbone
    backbone.roles.add(STEP_EVALUATOR, seed=context.seed("role", STEP_EVALUATOR) % 2**31, head=True)
    replies = _labelled(context, context.store.read("steps", StepLabels))
    with context.terminal.bar("steps", training_steps(len(replies), config.steps)) as bar:
        _train_role(context, replies, bar)
    backbone.roles.freeze(STEP_EVALUATOR)
    with context.writing_role(STEP_EVALUATOR) as written:
        save_role(backbone, STEP_EVALUATOR, written)
    return {}


def _train_role(context: Context, replies: Sequence[LabelledReply], bar: Bar) -> None:
    backbone, metrics = context.backbone, context.store.metrics_path("steps")

    def log(values: dict[str, float]) -> None:
        context.log("steps", values)
        bar.say(f"loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}")
        bar.advance()

    def checkpoints(optimizers: Mapping[str, AdamW]) -> Checkpoints:
        folder, check = context.checkpoint_folder("steps"), context.store.check_writable
        return Checkpoints(folder, backbone, [STEP_EVALUATOR], optimizers, metrics=[metrics], check=check)

    def resumed(step: int) -> None:
        context.store.keep_metrics("steps", step)
        bar.advance(step - bar.done)

    train_step_evaluator(
        backbone,
        replies,
        context.config.steps,
        checkpoints,
        seed=context.round_seed,
        batch_tokens=context.config.backbone.batch_tokens,
        log=log,
        resumed=resumed,
    )
