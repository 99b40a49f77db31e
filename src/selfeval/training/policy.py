"""Policy learning on one backbone: collect -> score -> advantage -> update -> log, the same loop for every learner.

Policy, reference, evaluator and the roles of a learner (a critic, value functions) are adapters on one base. The learner
decides which of them are trained (`training/learners/`, one file each). The loop implements the parts they share: reward
normalisation, KL control, watchdogs that roll back to the last good checkpoint, and bit-exact resuming.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selfeval.backbone.sequences import pad_sequences
from selfeval.errors import LoopError, NotFiniteError
from selfeval.prompt import Prompt
from selfeval.quality.comparisons import FEWEST, compare_paired
from selfeval.rollout.guide import Guide
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scores
from selfeval.training.experience import RewardScale, build_experience, experience_metrics
from selfeval.training.kl_control import KLControl
from selfeval.training.learners import make_learner
from selfeval.training.nonfinite import broken_layer
from selfeval.training.recorder import Recorder
from selfeval.training.schedules import draw
from selfeval.training.watchdogs import Alarm, check_iteration, not_finite, refuse_broken

__all__ = ["train_policy"]

_MOST_ROLL_BACKS = 3


def train_policy(context: LearnerContext, prompts: Sequence[QuestionPrompts], recorder: Recorder) -> Guide | None:
    """Train the role `policy`, resuming from the last checkpoint if there is one.

    Args:
        context: backbone, configuration, scorer and limits. The role must exist and have its initial weights.
        prompts: training questions; they are reshuffled in every pass, by the seed.
        recorder: stores checkpoints, samples and metrics.

    Returns:
        Value guidance to apply when sampling, or None if the learner updates the weights.

    Raises:
        LoopError: a watchdog stopped the training.
    """
    loop = _Loop(context)
    keeper = recorder.checkpoints(loop.roles, loop.learner.optimizers.by_role)
    best = keeper.beside("best")
    iteration = loop.restore(keeper)
    if iteration is None:
        iteration = 0
        keeper.save(0, loop.state())  # a roll-back in the first iteration needs a checkpoint
    recorder.resumed(iteration)
    while iteration < context.config.iterations:
        iteration += 1
        alarms = _iterate(loop, prompts, iteration, recorder)
        # Several watchdogs may fire in one iteration; the gravest action is taken.
        if any(a.action == "stop" for a in alarms):
            raise _stopped(alarms)
        if any(a.action == "roll_back" for a in alarms):
            iteration = loop.roll_back(keeper, alarms)
            recorder.rolled_back(iteration, alarms)  # before the checkpoint, which copies the metrics
            keeper.save(iteration, loop.state())  # resuming must not forget the halved learning rate
            continue
        if any(a.action == "finish" for a in alarms):
            # The result of the training is the policy with the best reading, not the last one.
            recorder.rolled_back(loop.go_back_to_best(best), alarms)
            break
        if loop.judged_best(iteration):
            best.save(iteration, loop.state())
        if iteration % context.config.checkpoint_every == 0 and iteration < context.config.iterations:
            keeper.save(iteration, loop.state())
    return loop.learner.guidance()


def _iterate(loop: _Loop, prompts: Sequence[QuestionPrompts], iteration: int, recorder: Recorder) -> list[Alarm]:
    """Run one iteration on its share of the prompts and record it."""
    started, context = time.monotonic(), loop.context
    # Questions and sampling seed depend on the iteration alone, so a resumed or rolled-back iteration repeats them.
    turn = draw(len(prompts), iteration - 1, context.config.questions_per_iteration, f"{context.seed}/prompts")
    samples, scores, values, alarms = loop.iterate([prompts[i] for i in turn], iteration)
    recorder.samples(iteration, *loop.own(samples, scores))
    recorder.metrics({**values, "seconds": time.monotonic() - started}, alarms)
    return alarms


def _drop_p_value(best: Sequence[float | None], now: Sequence[float | None]) -> float:
    """Return the p-value of the paired drop between two readings; 1 if there is no drop or too few questions."""
    both = [(old, new) for old, new in zip(best, now, strict=True) if old is not None and new is not None]
    if not both:
        return 1.0
    found = compare_paired([new for _, new in both], [old for old, _ in both])
    fell = found.difference.n >= FEWEST and found.losses > found.wins and found.p_value is not None
    return found.p_value if fell and found.p_value is not None else 1.0


def _stopped(alarms: Sequence[Alarm], note: str = "") -> LoopError:
    worst = next(a for a in alarms if a.action != "warn")
    return LoopError(f"policy training stopped at iteration {worst.step}: {worst.message}{note}")


class _Loop:
    """State of a policy training between iterations."""

    def __init__(self, context: LearnerContext) -> None:
        self.context = context
        self.learner = make_learner(context)
        self.kl = KLControl(context.config)
        self.scale: RewardScale | None = None
        self.first: dict[str, float] = {}
        self.rolled_back = 0
        self.readings: list[dict[str, Any]] = []

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles to checkpoint: those of the learner, and the reference if it moves."""
        return (*self.learner.roles, REFERENCE) if self.context.config.reference_ema is not None else self.learner.roles

    def iterate(
        self, prompts: Sequence[QuestionPrompts], iteration: int
    ) -> tuple[Samples, Scores, dict[str, float], list[Alarm]]:
        """Run one iteration and return samples, scores, metrics and alarms; partial results if a number is not finite."""
        config, learner = self.context.config, self.learner
        # Empty until the first number is available, so the handler below returns whatever was computed before the error.
        samples, scores, values = Samples([], []), Scores(torch.zeros(0)), {"step": float(iteration)}
        try:
            samples = learner.collect(prompts, iteration)
            scores = self.context.scorer(samples)
            # Fixed by the first iteration: critic, replay buffer and reward clip are all in these units.
            self.scale = self.scale or RewardScale.of(scores.whole_B, samples, whiten=config.whiten_rewards)
            # Value guidance controls the KL by its temperature, so a penalty in the reward would count the KL twice.
            penalty = 0.0 if learner.guidance() else self.kl.coefficient
            experience = build_experience(self.context, samples, scores, self.scale, penalty)
            experience = learner.advantages(samples, experience, self.scale)
            values |= experience_metrics(experience.sliced(learner.own_rows))
            refuse_broken(values)
            values |= learner.update(experience, self.scale, iteration)
        except NotFiniteError as error:
            return samples, scores, values, [not_finite(iteration, f"{error}{self._where(prompts, samples)}")]
        self.first = self.first or values
        values |= self._judge_metrics(iteration, values["score"])
        alarms = check_iteration(values, self.first, config)
        # Otherwise training stops or goes back to a checkpoint, which restores controller and reference.
        if all(a.action == "warn" for a in alarms):
            self._adapt(values["kl"], len(samples.asked))
        return samples, scores, values, alarms

    def own(self, samples: Samples, scores: Scores) -> tuple[Samples, Scores]:
        """Return the replies sampled by the trained policy; a value learner may also sample from the reference."""
        rows = self.learner.own_rows
        return Samples(samples.asked[rows], samples.rollouts[rows]), Scores(scores.whole_B[rows])

    def _where(self, prompts: Sequence[QuestionPrompts], samples: Samples) -> str:
        """Name the first layer with a non-finite output, by a forward pass of a few replies under each role."""
        backbone, few = self.context.backbone, list(zip(samples.asked, samples.rollouts, strict=True))[:4]
        # If sampling itself failed there is no reply: the last token of a prompt takes its place.
        texts = [(p.reply, r.ids) for p, r in few] or [
            (Prompt(p.reply.ids[:-1], p.reply.images), p.reply.ids[-1:]) for p in prompts[:4]
        ]
        batch = pad_sequences(backbone, [prompt for prompt, _ in texts], [reply for _, reply in texts])
        layer = broken_layer(backbone, backbone.roles.names, batch)
        return f" (first in {layer})" if layer else ""

    def _judge_metrics(self, iteration: int, score: float) -> dict[str, float]:
        """Return the metrics of the held-out judge, compared with its best reading so far; empty if it is not due."""
        every = self.context.config.judge_every
        if self.context.judge is None or every is None or iteration % every:
            return {}
        reading = self.context.judge(self.learner.guidance())
        if reading is None:
            return {}
        now: dict[str, Any] = {"step": float(iteration), "rolled_back": float(self.rolled_back)}
        now |= {"win_rate": reading.win_rate, "score": score, "outcomes": list(reading.outcomes)}
        # A new best reading is compared with itself: its drop and its gain are 0.
        best = max([*self.readings, now], key=lambda reading: reading["win_rate"])
        self.readings.append(now)
        return {
            "judge_win_rate": reading.win_rate,
            "judge_error": reading.error,
            "judge_unparsed": reading.unparsed,
            "judge_drop": best["win_rate"] - reading.win_rate,
            "judge_drop_p": _drop_p_value(best["outcomes"], reading.outcomes),
            "score_gain": score - best["score"],
        }

    def judged_best(self, iteration: int) -> bool:
        """Return whether this iteration has the best reading of the held-out judge so far."""
        best = self._best_reading()
        return best is not None and self._is_of(best, iteration)

    def _is_of(self, reading: Mapping[str, Any], iteration: int) -> bool:
        """Return whether a reading is of this iteration, and not of one that was rolled back."""
        return (reading["step"], reading["rolled_back"]) == (iteration, self.rolled_back)

    def _best_reading(self) -> dict[str, Any] | None:
        return max(self.readings, key=lambda reading: reading["win_rate"], default=None)

    def _adapt(self, kl: float, samples: int) -> None:
        """Update the KL coefficient, and the reference if it moves."""
        self.kl.update(kl, samples)
        if self.context.config.reference_ema is not None:
            _move_towards(self.context, self.context.config.reference_ema)

    def state(self) -> dict[str, Any]:
        return {
            "kl": self.kl.as_json(),
            "scale": self.scale.as_json() if self.scale else None,
            "first": self.first,
            "rolled_back": self.rolled_back,
            "readings": self.readings,
            "learner": self.learner.state(),
            **self.context.backbone.training_state(),
        }

    def restore(self, keeper: Checkpoints, step: int | None = None) -> int | None:
        """Restore the newest checkpoint and return its iteration; None if there is none.

        Args:
            keeper: manager of the checkpoints.
            step: Optional. Iteration whose checkpoint is preferred to newer ones.
        """
        state = keeper.restore(step)
        if state is None:
            return None
        self.kl.load(state["kl"])
        self.scale = RewardScale(**state["scale"]) if state["scale"] else None
        self.first, self.readings = dict(state["first"]), list(state["readings"])
        self._slow_down(int(state["rolled_back"]))
        self.learner.load(state["learner"])
        self.context.backbone.load_training_state(state)
        return int(state["step"])

    def go_back(self, keeper: Checkpoints, step: int | None = None) -> int:
        """Restore a checkpoint, which must exist, and return its iteration; see `restore`."""
        iteration = self.restore(keeper, step)
        assert iteration is not None
        return iteration

    def go_back_to_best(self, keeper: Checkpoints) -> int:
        """Restore the checkpoint with the best reading of the held-out judge, and return its iteration."""
        best = self._best_reading()
        assert best is not None
        # It need not be the newest: after a roll-back, an earlier iteration may have become the best.
        return self.go_back(keeper, int(best["step"]))

    def roll_back(self, keeper: Checkpoints, alarms: Sequence[Alarm]) -> int:
        """Restore the newest checkpoint, halve the learning rate and return the iteration.

        Raises:
            LoopError: the limit of roll-backs is exceeded.
        """
        times = self.rolled_back + 1
        if times > _MOST_ROLL_BACKS:
            raise _stopped(alarms, f" (after {_MOST_ROLL_BACKS} rollbacks, each of which halved the learning rate)")
        # The policy of this iteration is given up, so its reading is too: no checkpoint of it was saved.
        self.readings = [reading for reading in self.readings if not self._is_of(reading, alarms[0].step)]
        best = self._best_reading()
        iteration = self.go_back(keeper)
        if best is not None and best not in self.readings:
            self.readings.append(best)  # the checkpoint of that reading outlives the roll-back in `best`
        self._slow_down(times)
        return iteration

    def _slow_down(self, times: int) -> None:
        self.rolled_back = times
        self.learner.optimizers.scale = 0.5**times


@torch.no_grad()
def _move_towards(context: LearnerContext, share: float) -> None:
    """Update the reference as an EMA of the policy's weights: ref <- ref + share (policy - ref)."""
    backbone = context.backbone
    ours, theirs = backbone.roles.parameters(REFERENCE).values(), backbone.roles.parameters(POLICY).values()
    for own, policy in zip(ours, theirs, strict=True):
        own.lerp_(policy, share)
