"""policy: learns against the evaluator. The replies sampled on the way are kept, so that evaluation can look at them later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.records import Sampled, Split
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.rollout.guide import Guide
from selfeval.runs.policy import GUIDE, load_policy
from selfeval.stages.context import Context
from selfeval.store import write_json, writing
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import Preference
from selfeval.training.policy import train_policy
from selfeval.training.probe import HeldOutJudge
from selfeval.training.setting import POLICY, REFERENCE, Prompt, Samples, Scores, Setting
from selfeval.training.watchdogs import Alarm

__all__ = [
    "add_roles",
    "answer",
    "ensure_policy",
    "prompts_of",
    "run",
    "save_policy",
    "setting_of",
]


def add_roles(context: Context) -> None:
    """Policy and reference; a learner adds what else it needs."""
    backbone = context.backbone
    context.load_evaluators()
    start = context.ensure_start()
    backbone.add_role(POLICY, seed=context.seed("role", POLICY) % 2**31, copy_of=None if start == BASE else start)
    if context.config.policy.reference_ema:
        backbone.add_role(REFERENCE, copy_of=POLICY, trainable=False)  # it moves: weights of its own
    else:
        backbone.add_snapshot(REFERENCE, of=POLICY)


def save_policy(context: Context, guide: Guide | None) -> None:
    """Writes the role `policy`, after the roles that guide it and with a note of them where there are any."""
    guides = guide.roles if guide else ()
    for role in (*guides, POLICY):
        context.backbone.freeze(role)
        with writing(context.role_folder(role)) as folder:
            context.backbone.save_role(role, folder)
            if guide and role == POLICY:
                write_json(folder / GUIDE, guide.as_json())


def ensure_policy(context: Context) -> Guide | None:
    """Load the trained policy, and the value roles that guide it, unless they are loaded; return the guide."""
    return load_policy(context.backbone, context.store.root / "roles")


def answer(
    context: Context,
    prompts: Sequence[tuple[int, ...]],
    guide: Guide | None,
    *,
    seed: int,
    role: str = POLICY,
    advance: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """The trained policy's replies, plain samples at temperature 1; guided where its learner left its weights alone.

    Args:
        prompts: `reply` prompts as token ids.
        guide: what `ensure_policy` (or the training) gave.
        seed: of the draws.
        role: who answers; the bare base is what the policy was at its start.
        advance: called with the number of replies just finished.
    """
    config, requests = context.config, [Request(prompt) for prompt in prompts]
    limit, rows = config.replies.max_new_tokens, config.rollout_rows
    with context.backbone.acting_as(role):
        return generate(context.backbone, requests, max_new_tokens=limit, seed=seed, rows=rows, guide=guide, advance=advance)


def prompts_of(context: Context) -> list[Prompt]:
    """The training questions as token ids, less those kept aside for the held-out judge."""
    templates = context.templates
    return [
        Prompt(q.id, templates.prompt("reply", question=q.text), context.grade_prompt(q.id, q.text))
        for q in context.questions(Split.TRAIN)[_kept_aside(context) :]
    ]


def _kept_aside(context: Context) -> int:
    config = context.config.policy
    return min(config.judge_questions, len(context.questions(Split.TRAIN)) // 4) if config.judge_every else 0


def _judge_of(context: Context) -> HeldOutJudge | None:
    config, aside = context.config, context.questions(Split.TRAIN)[: _kept_aside(context)]
    if not aside:
        return None
    texts, limit = [q.text for q in aside], config.replies.max_new_tokens
    seed, rows = context.seed("held-out judge"), config.rollout_rows
    start = context.ensure_start()
    return HeldOutJudge(context.backbone, context.templates, config.verdicts, texts, limit, rows, seed, start)


def setting_of(context: Context) -> Setting:
    """What the learner is given."""
    config = context.config
    return Setting(
        context.backbone,
        config.policy,
        context.scorer(config.policy.pessimism),
        seed=context.round_seed,
        limit=config.replies.max_new_tokens,
        rows=config.rollout_rows,
        batch_tokens=config.batch_tokens,
        pairs=_kept_pairs(context) if config.policy.pairs == "kept" else (),
        judge=_judge_of(context),
    )


def _kept_pairs(context: Context) -> list[Preference]:
    """The training pairs, their prompts as the policy reads them."""
    templates = context.templates
    return [
        Preference(templates.prompt("reply", question=p.prompt), p.chosen_ids, p.rejected_ids, p.confidence)
        for p in context.training_pairs()
    ]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def _sampled_until(context: Context) -> Callable[[int], list[Path]]:
    """The files of sampled replies that the training has written up to an iteration."""
    return lambda iteration: [context.store.shard_path("policy", number) for number in range(1, iteration + 1)]


def run(context: Context) -> dict[str, Any]:
    """Trains and saves the role `policy` (or what guides it); returns counts and what the watchdogs saw."""
    config, store, backbone = context.config, context.store, context.backbone
    add_roles(context)

    def checkpoints(roles: Sequence[str], optimizers: Mapping[str, Any]) -> Checkpoints:
        metrics = [store.metrics_path(name) for name in ("policy", "watchdogs")]
        return Checkpoints(
            context.checkpoint_folder("policy"), backbone, roles, optimizers, metrics=metrics, written=_sampled_until(context)
        )

    def keep(iteration: int, samples: Samples, scores: Scores) -> None:
        texts = [context.templates.text(r.ids) for r in samples.rollouts]
        rows = zip(samples.asked, texts, scores.whole_B.tolist(), samples.rollouts, strict=True)
        sampled = [Sampled(iteration, p.question_id, t, round(s, 4), r.finished) for p, t, s, r in rows]
        store.write_shard("policy", iteration, sampled)

    with context.terminal.bar("policy", config.policy.iterations) as bar:

        def log(values: dict[str, float], alarms: Sequence[Alarm]) -> None:
            context.log("policy", {**_finite(values), "step": int(values["step"])})
            for alarm in alarms:
                store.add_metrics("watchdogs", alarm.as_json())
                context.terminal.note(f"policy, iteration {alarm.step}: {alarm.name}: {alarm.message}")
            if "reward" in values:  # numbers may have broken before there was one
                bar.say(f"reward {values['reward']:.2f} kl {values['kl']:.2f} length {values['length']:.0f}")
            bar.advance()

        def resumed(iteration: int) -> None:
            for name in ("policy", "watchdogs"):
                store.keep_metrics(name, iteration)
            bar.advance(iteration - bar.done)

        def rolled_back(iteration: int, alarms: Sequence[Alarm]) -> None:
            resumed(iteration)
            for alarm in alarms:  # noted at the iteration gone back to, so that going on from there does not forget them
                store.add_metrics("watchdogs", {**alarm.as_json(), "step": iteration, "seen_at": alarm.step})
            ending = any(alarm.action == "finish" for alarm in alarms)
            how = "where the held-out judge liked it best, and finished" if ending else "with half the learning rate"
            context.terminal.note(f"policy: back to iteration {iteration}, {how}")

        guide = train_policy(
            setting_of(context), prompts_of(context), checkpoints, keep=keep, log=log, resumed=resumed, rolled_back=rolled_back
        )
    save_policy(context, guide)
    return {
        "iterations": len(store.read_metrics("policy")),
        "watchdogs": len(store.read_metrics("watchdogs")),
        "adapter_bytes": backbone.adapter_bytes,
        "weight_copies": backbone.weight_copies(),
    }
