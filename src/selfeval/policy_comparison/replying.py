"""Sample the replies of policies as the evaluation of their runs does, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfeval.backbone.adapters import BASE
from selfeval.judge_benchmark.benchmark import loaded_once
from selfeval.policy_comparison.sources import Source
from selfeval.records import Question
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.runs.conversations import check_conversations
from selfeval.runs.model import RunModel
from selfeval.runs.policy import load_policy
from selfeval.runs.reader import RunReader, round_seed
from selfeval.stages.draws import Draws
from selfeval.stages.shards import Batch, InProcess, ModelHandle, ShardOutput, StageShards, map_shards
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, fingerprint
from selfeval.training.context import POLICY

__all__ = ["SHARD", "Answer", "AskPolicy", "replies_of"]

SHARD = 64
"""Questions per shard: the work that a kill can lose."""


@dataclass(frozen=True)
class Answer:
    """A reply to a question.

    Attributes:
        text: the reply, without thinking.
        finished: whether it ended before the token limit.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class AskPolicy:
    """Work: one reply to each question of a shard, with the temperature, nucleus and token limit of the run's evaluation.

    Attributes:
        run: folder of the run.
        role: the policy, or the base.
    """

    run: Path
    role: str

    def __call__(self, model: ModelHandle, batch: Batch[Question]) -> ShardOutput:
        """Return an `Answer` to each question."""
        run = RunModel(RunReader(self.run), model.backbone, model.templates)
        check_conversations(model.templates, batch.records)
        guide = load_policy(model.backbone, run.roles) if self.role == POLICY else None
        config = run.config
        prompts = [model.templates.reply_prompt(question) for question in batch.records]
        with model.backbone.acting_as(self.role):
            rollouts = generate(
                model.backbone,
                [Request(prompt, config.evaluation.temperature, config.evaluation.top_p) for prompt in prompts],
                max_new_tokens=run.reply_limit,
                seed=Draws(round_seed(config.seed, run.reader.round)).seed("comparison", batch.index),
                batch_size=config.backbone.rollout_batch_size,
                guide=guide,
                thinking=run.thinking,
            )
        return ShardOutput([Answer(model.templates.text(r.reply_ids), r.finished) for r in rollouts])


def replies_of(
    store: RunStore, source: Source, questions: Sequence[Question], terminal: Terminal, *, trust_remote_code: bool = False
) -> list[Answer]:
    """Return the reply of a policy to each question: the known ones, otherwise sampled ones.

    The known replies of a base are used only if they cover all questions. Sampled replies are kept in the store under a
    fingerprint of the policy and the questions, and are not sampled again.

    Args:
        store: folder of the results.
        source: the policy.
        questions: the questions.
        terminal: shows progress.
        trust_remote_code: run code that comes with the model. Default: False.
    """
    if all(question.text in source.replies for question in questions):
        return [Answer(*source.replies[question.text]) for question in questions]
    asked = [(q.text, [(m.role, m.content) for m in q.messages]) for q in questions]
    stage = f"replies-{fingerprint([source.kind, source.key, asked])}"
    work = AskPolicy(source.path, POLICY if source.kind == "policy" else BASE)

    def load() -> ModelHandle:
        model = RunModel.load(RunReader(source.path), trust_remote_code=trust_remote_code)
        return ModelHandle(model.backbone, model.templates)

    shards = StageShards(store, terminal, stage, title=f"replies of {source.name}")
    map_shards(shards, questions, SHARD, work, InProcess(loaded_once(load, terminal, store)))
    return store.read(stage, Answer)
