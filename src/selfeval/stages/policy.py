"""policy: PPO against the evaluator. The replies sampled on the way are kept, so that evaluation can look at them later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.records import Split
from selfeval.rollout.engine import Rollout
from selfeval.stages.context import Context
from selfeval.store import writing
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.policy import CRITIC, POLICY, REFERENCE, Prompt, train_policy
from selfeval.training.watchdogs import Alarm

__all__ = ["Sampled", "ensure_evaluator", "run"]


@dataclass(frozen=True)
class Sampled:
    """A reply that the policy gave while it was trained."""

    step: int
    question_id: str
    text: str
    score: float
    finished: bool


def ensure_evaluator(context: Context) -> None:
    """Loads the trained evaluator into the backbone unless it is there already."""
    if EVALUATOR not in context.backbone.roles:
        context.backbone.load_role(EVALUATOR, context.role_folder(EVALUATOR))


def _add_roles(context: Context) -> None:
    backbone = context.backbone
    ensure_evaluator(context)
    backbone.add_role(POLICY, seed=context.seed("role", POLICY) % 2**31)
    backbone.add_snapshot(REFERENCE, of=POLICY)
    backbone.add_role(CRITIC, copy_of=EVALUATOR, head=True)


def _prompts(context: Context) -> list[Prompt]:
    templates = context.templates
    return [
        Prompt(q.id, templates.prompt("reply", question=q.text), context.grade_prompt(q.id, q.text))
        for q in context.questions(Split.TRAIN)
    ]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def run(context: Context) -> dict[str, Any]:
    """Trains and saves the role `policy`; returns counts and what the watchdogs saw."""
    config, store, backbone = context.config, context.store, context.backbone
    _add_roles(context)

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(context.checkpoint_folder("policy"), backbone, [POLICY, CRITIC], optimizers)

    def keep(iteration: int, asked: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Sequence[float]) -> None:
        texts = [context.templates.text(r.ids) for r in rollouts]
        rows = zip(asked, texts, scores, rollouts, strict=True)
        samples = [Sampled(iteration, p.question_id, t, round(s, 4), r.finished) for p, t, s, r in rows]
        store.write_shard("policy", iteration, samples)

    with context.terminal.bar("policy", config.policy.iterations) as bar:

        def log(values: dict[str, float], alarms: Sequence[Alarm]) -> None:
            store.add_metrics("policy", {**_finite(values), "step": int(values["step"])})
            for alarm in alarms:
                store.add_metrics("watchdogs", alarm.as_json())
                context.terminal.note(f"policy, iteration {alarm.step}: {alarm.name}: {alarm.message}")
            bar.say(f"reward {values['reward']:.2f} kl {values['kl']:.2f} length {values['length']:.0f}")
            bar.advance()

        def resumed(iteration: int) -> None:
            for name in ("policy", "watchdogs"):
                store.keep_metrics(name, iteration)
            bar.advance(iteration)

        train_policy(
            backbone,
            _prompts(context),
            config.policy,
            checkpoints,
            seed=config.seed,
            limit=config.replies.max_new_tokens,
            rows=config.rollout_rows,
            batch_tokens=config.batch_tokens,
            keep=keep,
            log=log,
            resumed=resumed,
        )
    backbone.freeze(POLICY)
    with writing(context.role_folder(POLICY)) as folder:
        backbone.save_role(POLICY, folder)
    return {
        "iterations": config.policy.iterations,
        "watchdogs": len(store.read_metrics("watchdogs")),
        "adapter_bytes": backbone.adapter_bytes,
        "weight_copies": backbone.weight_copies(),
    }
