"""Work of the evaluation that needs the model: scores of the evaluator, replies of the policy, verdicts of the referee.

It is computed in batches of a fixed size, in this process or on workers, with the same results. The roles that the training
stages saved are loaded in the process that computes, if it does not have them yet. Nothing is written: an evaluation that is
interrupted begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import RunConfig, VerdictsConfig
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.prompt import Prompt
from selfeval.records import Question
from selfeval.rollout.engine import generate, visible_ids
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.runs.members import load_members
from selfeval.runs.policy import load_policy
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, Work, computed, counting
from selfeval.stages.terminal import Bar
from selfeval.training.context import POLICY
from selfeval.training.scoring import EvaluatorScorer

__all__ = [
    "AnswerQuestions",
    "JudgeReplies",
    "PolicyReply",
    "Score",
    "ScoreReplies",
    "answered_by_policy",
    "judged_by_referee",
    "kl_to_start",
    "sample_replies",
    "scores_of",
]

Score = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Tensor]
"""Returns the normalised scores `[K, B]` of all members for B replies after their grade prompts."""

Scored = tuple[Prompt, tuple[int, ...]]
"""The grade prompt and the token ids of a reply."""


@dataclass(frozen=True)
class PolicyReply:
    """A reply of the trained policy.

    Attributes:
        text: the reply without the thinking.
        ids: token ids that are scored.
        finished: whether it ended before the limit.
        kl: sum over its tokens of the log-prob under the policy minus that under the start, in nats.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    kl: float


# -- in any process -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreReplies:
    """Work: score replies with the trained evaluators. The records are `Scored`, the results the scores of the members.

    Attributes:
        config: settings of the run.
        roles: folder of the trained roles.
    """

    config: RunConfig
    roles: Path

    def __call__(self, model: ModelHandle, batch: Batch[Scored]) -> ShardOutput:
        members = load_members(model.backbone, self.roles, self.config)
        scorer = EvaluatorScorer(model.backbone, self.config.backbone.batch_tokens, members)
        prompts, ids = [prompt for prompt, _ in batch.records], [reply for _, reply in batch.records]
        scores_KB = scorer.each(prompts, ids, counting(model.report_progress, len(ids)))
        return ShardOutput(scores_KB.T.tolist())


@dataclass(frozen=True)
class AnswerQuestions:
    """Work: answer questions with the trained policy, as evaluation samples. The results are `PolicyReply`.

    Attributes:
        config: settings of the run.
        roles: folder of the trained roles.
        limit: token limit of a reply.
        draws: random numbers of the round.
    """

    config: RunConfig
    roles: Path
    limit: int
    draws: Draws

    def __call__(self, model: ModelHandle, batch: Batch[Question]) -> ShardOutput:
        guide = load_policy(model.backbone, self.roles)
        prompts = [model.templates.reply_prompt(question) for question in batch.records]
        rollouts = sample_replies(
            model,
            self.config,
            prompts,
            guide,
            limit=self.limit,
            # Each batch has its own numbers, or the first replies of all batches would be drawn alike.
            seed=self.draws.seed("evaluation", batch.index),
            advance=counting(model.report_progress, len(prompts)),
        )
        kls = kl_to_start(model, self.config, prompts, rollouts)
        return ShardOutput(
            [
                PolicyReply(model.templates.text(r.reply_ids), visible_ids(model.backbone, r), r.finished, kl)
                for r, kl in zip(rollouts, kls, strict=True)
            ]
        )


@dataclass(frozen=True)
class JudgeReplies:
    """Work: compare replies with the referee. The results are judgements.

    Attributes:
        config: settings of the referee.
        batch_size: of sampling.
        seed: of the round.
    """

    config: VerdictsConfig
    batch_size: int
    seed: int

    def __call__(self, model: ModelHandle, batch: Batch[Comparison]) -> ShardOutput:
        # The referee's prompt labelled no training pair, so the policy cannot have learned to please it.
        referee = make_judge(
            model.backbone,
            model.templates,
            self.config,
            batch_size=self.batch_size,
            role="referee",
            seed=self.seed,
            answers=model.answers,
        )
        with model.backbone.acting_as(BASE):
            return ShardOutput(referee.judge(batch.records, counting(model.report_progress, 2 * len(batch.records))))


def kl_to_start(model: ModelHandle, config: RunConfig, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float]:
    """Return, per reply, the sum over its tokens of log-prob under the policy minus log-prob under the start, in nats."""
    # Both at the temperature of the samples: the KL of the two distributions that are compared.
    tokens, temperature = config.backbone.batch_tokens, config.evaluation.temperature
    ids = [r.ids for r in rollouts]
    with model.backbone.acting_as(model.start()):
        start = reply_logprobs(model.backbone, prompts, ids, batch_tokens=tokens, temperature=temperature)
    return [sum(r.logprobs) - sum(s) for r, s in zip(rollouts, start, strict=True)]


def sample_replies(
    model: ModelHandle,
    config: RunConfig,
    prompts: Sequence[Prompt],
    guide: Guide | None,
    *,
    limit: int,
    seed: int,
    role: str = POLICY,
    advance: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample replies of the trained policy as evaluation does, with value guidance if available.

    Args:
        model: the model, with the roles that reply.
        config: settings of the run.
        prompts: `reply` prompts.
        guide: Optional. Guide returned by `load_policy` or by the training.
        limit: token limit of a reply.
        seed: sampling seed.
        role: role that replies; the bare base is the initial policy. Default: the policy.
        advance: Optional. Called with the number of replies finished since the last call.
    """
    requests = [Request(prompt, config.evaluation.temperature, config.evaluation.top_p) for prompt in prompts]
    with model.backbone.acting_as(role):
        return generate(
            model.backbone,
            requests,
            max_new_tokens=limit,
            seed=seed,
            batch_size=config.backbone.rollout_batch_size,
            guide=guide,
            thinking=model.templates.thinking(config.replies.max_thinking_tokens),
            advance=advance,
        )


# -- in the process of the command --------------------------------------------------------------------------------------


def scores_of(context: Context, bar: Bar) -> Score:
    """Return a function that scores replies with the evaluators of the round, in batches, and moves the bar by replies."""
    work = ScoreReplies(context.config, context.store.root.resolve() / "roles")

    def score(prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]) -> Tensor:
        rows = [(prompt, tuple(ids)) for prompt, ids in zip(prompts, replies, strict=True)]
        found = _in_batches(context, work, rows, 2 * context.config.verdicts.shard, bar)
        return torch.tensor(found, dtype=torch.float32).reshape(len(rows), context.config.evaluator.members).T

    return score


def answered_by_policy(context: Context, questions: Sequence[Question], bar: Bar) -> list[PolicyReply]:
    """Answer questions with the policy of the round, in batches, and move the bar by questions."""
    roles = context.store.root.resolve() / "roles"
    work = AnswerQuestions(context.config, roles, context.reply_limit, context.draws)
    return _in_batches(context, work, questions, context.config.replies.shard, bar)


def judged_by_referee(context: Context, comparisons: Sequence[Comparison], bar: Bar) -> list[Judgement]:
    """Compare replies with the referee, in batches, and move the bar twice for each comparison: once for each order."""
    config = context.config
    work = JudgeReplies(config.judging("referee"), config.backbone.rollout_batch_size, context.round_seed)
    return _in_batches(context, work, comparisons, config.verdicts.shard, bar, weight=2)


def _in_batches(context: Context, work: Work[Any], records: Sequence[Any], size: int, bar: Bar, weight: int = 1) -> list[Any]:
    """Return the results of all records, in order. The size of a batch does not depend on the workers."""
    batches = [Batch(number, records[first : first + size]) for number, first in enumerate(range(0, len(records), size))]
    found = {batch.index: output.records for batch, output in computed(context.executor, work, batches, bar, weight)}
    return [record for number in range(len(batches)) for record in found[number]]
