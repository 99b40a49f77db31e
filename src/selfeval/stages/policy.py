"""policy: train the policy against the evaluator, and keep the sampled replies for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import save_role
from selfeval.config import LEARNERS, RunConfig
from selfeval.errors import LoopError
from selfeval.judging.steps import step_ends
from selfeval.records import Question, Sampled, Split
from selfeval.rollout.guide import Guide
from selfeval.runs.policy import GUIDE, load_policy
from selfeval.stages.context import Context
from selfeval.stages.policy_gate import check_evaluator
from selfeval.stages.steps import ensure_step_evaluator
from selfeval.stages.terminal import Bar
from selfeval.store import write_json
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scorer, Scores
from selfeval.training.evaluator import EVALUATOR, Preference
from selfeval.training.held_out_judge import HeldOutJudge
from selfeval.training.policy import train_policy
from selfeval.training.step_evaluator import STEP_EVALUATOR
from selfeval.training.step_scoring import StepScorer
from selfeval.training.watchdogs import Alarm

__all__ = [
    "add_roles",
    "ensure_policy",
    "learner_context",
    "output_roles",
    "prompts_of",
    "run",
    "save_policy",
]

_METRICS = ("policy", "watchdogs")


def add_roles(context: Context) -> None:
    """Add policy and reference. A learner adds further roles."""
    backbone = context.backbone
    # The scorer needs them, and a critic starts as a copy of one.
    context.load_evaluators()
    start = context.ensure_start()
    backbone.roles.add(POLICY, seed=context.seed("role", POLICY) % 2**31, copy_of=None if start == BASE else start)
    if context.config.policy.reference_ema is not None:
        backbone.roles.add(REFERENCE, copy_of=POLICY, trainable=False)  # the reference moves, so it needs separate weights
    else:
        # The policy's initial weights: if it starts bare, the reference is the base itself and needs no memory.
        backbone.roles.add_snapshot(REFERENCE, of=POLICY)


def output_roles(config: RunConfig) -> tuple[str, ...]:
    """Return all roles that the stage may have saved.

    Those of every learner are included, because an earlier run of the stage may have used another one.
    """
    return (POLICY, *dict.fromkeys(role for spec in LEARNERS.values() for role in spec.outputs))


def save_policy(context: Context, guide: Guide | None) -> None:
    """Save the role `policy`; with a guide, save its roles first and record them next to the policy."""
    # The policy comes last, because its file names the other roles: if it exists, they do.
    guides = guide.roles if guide else ()
    for role in (*guides, POLICY):
        context.backbone.roles.freeze(role)
        with context.writing_role(role) as folder:
            save_role(context.backbone, role, folder)
            if guide and role == POLICY:
                write_json(folder / GUIDE, guide.as_json())


def ensure_policy(context: Context) -> Guide | None:
    """Load the trained policy and its guiding value roles if needed, and return the guide."""
    return load_policy(context.backbone, context.store.root / "roles")


def prompts_of(context: Context) -> list[QuestionPrompts]:
    """Return the training questions as token ids, excluding those of the held-out judge."""
    templates = context.templates
    return [
        QuestionPrompts(q.id, templates.reply_prompt(q), context.grade_prompt(q.id, q.text))
        # Held-out judge questions are the first ones; both functions count them with `_kept_aside`.
        for q in context.questions(Split.TRAIN)[_kept_aside(context) :]
    ]


def _kept_aside(context: Context) -> int:
    config = context.config.policy
    # At most a quarter, so a small run keeps most of its questions for training.
    return min(config.judge_questions, len(context.questions(Split.TRAIN)) // 4) if config.judge_every is not None else 0


def _judge_of(context: Context) -> HeldOutJudge | None:
    config, aside = context.config, context.questions(Split.TRAIN)[: _kept_aside(context)]
    if not aside:
        return None
    limit = context.reply_limit
    seed, batch_size = context.seed("held-out judge"), config.backbone.rollout_batch_size
    start = context.ensure_start()
    return HeldOutJudge(
        *(context.backbone, context.templates, context.judge("referee"), aside, limit, batch_size, seed, start),
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        thinking=context.thinking,
    )


def learner_context(context: Context) -> LearnerContext:
    """Build the context of the learner."""
    config = context.config
    return LearnerContext(
        context.backbone,
        config.policy,
        _scorer(context),
        seed=context.round_seed,
        limit=context.reply_limit,
        batch_size=config.backbone.rollout_batch_size,
        batch_tokens=config.backbone.batch_tokens,
        # A critic starts as a copy of the role whose score it predicts.
        evaluator=STEP_EVALUATOR if config.policy.steps == "reply" else EVALUATOR,
        pairs=_kept_pairs(context) if config.policy.settings.reads_kept_pairs else (),
        judge=_judge_of(context),
        thinking=context.thinking,
        engine=context.engine,
    )


def _scorer(context: Context) -> Scorer:
    """Return the scorer of the replies: the evaluators, or the step evaluator with or without them."""
    config, outcomes = context.config, context.scorer(context.config.policy.pessimism)
    if config.policy.steps == "off":
        return outcomes
    ensure_step_evaluator(context)
    decode, end_ids = context.templates.tokenizer.decode, context.backbone.loaded.eos_ids
    return StepScorer(
        context.backbone,
        config.backbone.batch_tokens,
        ends=lambda ids: step_ends(ids, decode, config.steps.form, end_ids),
        use=config.policy.steps,
        outcomes=outcomes,
        combine=config.steps.combine,
        weight=config.policy.step_weight,
    )


def _kept_pairs(context: Context) -> list[Preference]:
    """Return the training pairs with the policy's prompts.

    Raises:
        LoopError: a reply was written after a chain of thought, which the pairs do not contain.
    """
    templates = context.templates
    # The policy would be trained to reply without the thinking, from which the judged replies followed.
    if any(reply.thinking for store in (*context.earlier, context.store) for reply in context.replies(store).values()):
        raise LoopError(
            f"policy.{context.config.policy.learner} trains on the judged pairs, but the model thinks before it replies, and "
            'the pairs do not contain its reasoning; set its pairs = "sampled" or choose another learner, such as ppo, or '
            "disable the thinking, for example with chat.arguments = { enable_thinking = false }"
        )
    questions = {q.id: q for store in (*context.earlier, context.store) for q in store.read("questions", Question)}
    return [
        Preference(templates.reply_prompt(questions[p.question_id]), p.chosen_ids, p.rejected_ids, p.confidence)
        for p in context.training_pairs()
    ]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    # NaN is not JSON; `explained_variance` may be NaN by design (training/watchdogs.py).
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def _sampled_until(context: Context) -> Callable[[int], list[Path]]:
    """Return a function that lists the files of sampled replies up to a given iteration."""
    # Iteration 0 is the initial checkpoint and has no samples.
    return lambda iteration: [context.store.shard_path("policy", number) for number in range(1, iteration + 1)]


@dataclass(frozen=True)
class _RunRecorder:
    """Writes training results to the run folder and shows progress."""

    context: Context
    bar: Bar

    def checkpoints(self, roles: Sequence[str], optimizers: Mapping[str, Any]) -> Checkpoints:
        context, store = self.context, self.context.store
        folder, metrics = context.checkpoint_folder("policy"), [store.metrics_path(name) for name in _METRICS]
        written, check = _sampled_until(context), store.check_writable
        return Checkpoints(folder, context.backbone, roles, optimizers, metrics=metrics, written=written, check=check)

    def resumed(self, iteration: int) -> None:
        for name in _METRICS:
            self.context.store.keep_metrics(name, iteration)
        # Negative after a roll-back: the bar moves back.
        self.bar.advance(iteration - self.bar.done)

    def samples(self, iteration: int, samples: Samples, scores: Scores) -> None:
        templates = self.context.templates
        rows = zip(samples.asked, scores.whole_B.tolist(), samples.rollouts, strict=True)
        sampled = [
            Sampled(
                *(iteration, p.question_id, templates.text(r.reply_ids), round(score, 4), r.finished),
                thinking=templates.thinking_text(r.thinking_ids),
            )
            for p, score, r in rows
        ]
        self.context.store.write_shard("policy", iteration, sampled)

    def metrics(self, values: dict[str, float], alarms: Sequence[Alarm]) -> None:
        context = self.context
        context.log("policy", {**_finite(values), "step": int(values["step"])})
        for alarm in alarms:
            context.store.add_metrics("watchdogs", alarm.as_json())
            context.terminal.note(f"policy, iteration {alarm.step}: {alarm.name}: {alarm.message}")
        if "reward" in values:  # a NaN may stop the iteration before it has a reward
            self.bar.say(f"reward {values['reward']:.2f} kl {values['kl']:.2f} length {values['length']:.0f}")
        self.bar.advance()

    def rolled_back(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        self.resumed(iteration)
        # `resumed` above has removed the lines of the undone iterations, the alarm's own among them.
        for alarm in alarms:  # logged at the checkpoint's iteration, so a resumed training keeps them
            self.context.store.add_metrics("watchdogs", {**alarm.as_json(), "step": iteration, "seen_at": alarm.step})
        ending = any(alarm.action == "finish" for alarm in alarms)
        how = "where the held-out judge's win rate was best; training is finished" if ending else "with half the learning rate"
        self.context.terminal.note(f"policy: rolled back to iteration {iteration}, {how}")


def run(context: Context) -> dict[str, Any]:
    """Train and save the role `policy`, or the roles that guide it; return counts and the number of alarms.

    Raises:
        LoopError: the evaluator is not shown to be useful (`check_evaluator`).
    """
    return context.train(_train)


def _train(context: Context) -> dict[str, Any]:
    check_evaluator(context)
    store, backbone = context.store, context.backbone
    add_roles(context)
    prompts = prompts_of(context)
    with context.terminal.bar("policy", context.config.policy.iterations) as bar:
        guide = train_policy(learner_context(context), prompts, _RunRecorder(context, bar))
    save_policy(context, guide)
    return {
        "iterations": len(store.read_metrics("policy")),
        "watchdogs": len(store.read_metrics("watchdogs")),
        "adapter_bytes": backbone.census.adapter_bytes,
        "weight_copies": backbone.census.weight_copies(),
        "shared_prompts": backbone.shares_prefixes(context.reply_limit + max(len(p.reply.ids) for p in prompts)),
    }
