"""Policy learning on one backbone: collect -> score -> advantage -> update -> log, the same loop for every learner.

Policy, reference, evaluator and what a learner adds (a critic, value functions) are roles; which of them learn is the
learner's business (`training/learners/`, one file each). The loop keeps what is common: the units of the reward, KL control,
watchdogs with a way back to the last good checkpoint, and resuming bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW

from selfeval.backbone.sequences import pad_sequences
from selfeval.errors import LoopError, NotFiniteError
from selfeval.rollout.guide import Guide
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.diagnosis import broken_layer
from selfeval.training.experience import RewardScale, measure, observe
from selfeval.training.kl_control import KLControl
from selfeval.training.learners import make_learner
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.schedules import draw
from selfeval.training.setting import POLICY, REFERENCE, Prompt, Samples, Scores, Setting
from selfeval.training.watchdogs import Alarm, check_iteration, not_finite, refuse_broken

__all__ = ["train_policy"]

_MOST_ROLL_BACKS = 3


def train_policy(
    setting: Setting,
    prompts: Sequence[Prompt],
    checkpoints: Callable[[Sequence[str], Mapping[str, AdamW]], Checkpoints],
    *,
    keep: Callable[[int, Samples, Scores], None],
    log: Callable[[dict[str, float], Sequence[Alarm]], None],
    resumed: Callable[[int], None],
    rolled_back: Callable[[int, Sequence[Alarm]], None],
) -> Guide | None:
    """Trains the role `policy`, which exists and is at its start, from the last checkpoint if there is one.

    Args:
        setting: backbone, configuration, scorer and limits.
        prompts: training questions; they are gone through in a fixed random order, again and again.
        checkpoints: makes the keeper of checkpoints from the roles and optimizers that it shall hold.
        keep: called with each iteration's number, replies and scores.
        log: called with its metrics and what the watchdogs saw.
        resumed: called with the iteration of the checkpoint that training goes on from (0 at a fresh start).
        rolled_back: called with the iteration that a watchdog went back to, and what it saw.

    Returns:
        What bends the policy's sampling from now on, where the learner left its weights alone; None where they learned.

    Raises:
        LoopError: a watchdog stopped the training.
    """
    loop = _Loop(setting)
    keeper = checkpoints(loop.roles, loop.learner.optimizers.by_role)
    best = keeper.beside("best")
    iteration = loop.restore(keeper)
    if iteration is None:
        iteration = 0
        keeper.save(0, loop.state())  # there must be something to go back to
    resumed(iteration)
    per_iteration = setting.config.questions_per_iteration
    while iteration < setting.config.iterations:
        iteration += 1
        started = time.monotonic()
        asked = [prompts[i] for i in draw(len(prompts), iteration - 1, per_iteration, f"{setting.seed}/prompts")]
        samples, scores, values, alarms = loop.iterate(asked, iteration)
        keep(iteration, *loop.own(samples, scores))
        log({**values, "seconds": time.monotonic() - started}, alarms)
        if any(a.action == "stop" for a in alarms):
            raise _stopped(alarms)
        if any(a.action == "roll_back" for a in alarms):
            iteration = loop.roll_back(keeper, alarms)
            rolled_back(iteration, alarms)  # before the checkpoint, which has a copy of the metrics
            keeper.save(iteration, loop.state())
            continue
        if any(a.action == "finish" for a in alarms):
            rolled_back(loop.go_back(best), alarms)
            break
        if loop.judged_best(iteration):
            best.save(iteration, loop.state())
        if iteration % setting.config.checkpoint_every == 0 and iteration < setting.config.iterations:
            keeper.save(iteration, loop.state())
    return loop.guide


def _stopped(alarms: Sequence[Alarm], note: str = "") -> LoopError:
    worst = next(a for a in alarms if a.action != "warn")
    return LoopError(f"policy training stopped at iteration {worst.step}: {worst.message}{note}")


class _Loop:
    """What one policy training carries from iteration to iteration."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.learner = make_learner(setting)
        self.kl = KLControl(setting.config)
        self.scale: RewardScale | None = None
        self.first: dict[str, float] = {}
        self.rolled_back = 0
        self.looks: list[dict[str, float]] = []

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose weights a checkpoint holds."""
        return (*self.learner.roles, REFERENCE) if self.setting.config.reference_ema else self.learner.roles

    @property
    def guide(self) -> Guide | None:
        """What bends the policy's sampling now; None where its own weights learn."""
        return self.learner.guide if isinstance(self.learner, ValueLearner) else None

    def iterate(self, prompts: Sequence[Prompt], iteration: int) -> tuple[Samples, Scores, dict[str, float], list[Alarm]]:
        """One iteration; its metrics, and what the watchdogs say to them. Where numbers broke, as far as it came."""
        config, learner = self.setting.config, self.learner
        samples, scores, values = Samples([], []), Scores(torch.zeros(0)), {"step": float(iteration)}
        try:
            samples = learner.collect(prompts, iteration)
            scores = self.setting.scorer(samples)
            self.scale = self.scale or RewardScale.of(scores.whole_B, samples, whiten=config.whiten_rewards)
            penalty = 0.0 if self.guide else self.kl.coefficient  # values are held by their own temperature
            experience = observe(self.setting, samples, scores, self.scale, penalty)
            experience = learner.advantages(experience, self.scale)
            values |= measure(learner.guided(experience) if isinstance(learner, ValueLearner) else experience)
            refuse_broken(values)
            values |= learner.update(experience, self.scale, iteration)
        except NotFiniteError as error:
            return samples, scores, values, [not_finite(iteration, f"{error}{self._where(prompts, samples)}")]
        self.first = self.first or values
        values |= self._look(iteration, values["score"])
        alarms = check_iteration(values, self.first, config)
        if all(a.action == "warn" for a in alarms):
            self._follow(values["kl"], len(samples.asked))
        return samples, scores, values, alarms

    def own(self, samples: Samples, scores: Scores) -> tuple[Samples, Scores]:
        """The replies that are the policy's; a value learner may have sampled the reference's beside them."""
        if not isinstance(self.learner, ValueLearner):
            return samples, scores
        rows = self.learner.guided_rows
        return Samples(samples.asked[rows], samples.rollouts[rows]), Scores(scores.whole_B[rows])

    def _where(self, prompts: Sequence[Prompt], samples: Samples) -> str:
        """Which layer broke, where it is one: a few replies, or prompts if there are none, go through under each role."""
        backbone, few = self.setting.backbone, list(zip(samples.asked, samples.rollouts, strict=True))[:4]
        texts = [(p.reply, r.ids) for p, r in few] or [(p.reply[:-1], p.reply[-1:]) for p in prompts[:4]]
        batch = pad_sequences(backbone, [prompt for prompt, _ in texts], [reply for _, reply in texts])
        layer = broken_layer(backbone, backbone.roles, batch)
        return f" (first in {layer})" if layer else ""

    def _look(self, iteration: int, score: float) -> dict[str, float]:
        """What the held-out judge says, when it is its turn, beside what it said when it liked the policy best."""
        every = self.setting.config.judge_every
        if self.setting.judge is None or not every or iteration % every:
            return {}
        reading = self.setting.judge(self.guide)
        if reading is None:
            return {}
        now = {"step": float(iteration), "rolled_back": float(self.rolled_back)}
        now |= {"win_rate": reading.win_rate, "score": score}
        best = max([*self.looks, now], key=lambda look: look["win_rate"])
        self.looks.append(now)
        return {
            "judge_win_rate": reading.win_rate,
            "judge_error": reading.error,
            "judge_unparsed": reading.unparsed,
            "judge_drop": best["win_rate"] - reading.win_rate,
            "score_gain": score - best["score"],
        }

    def judged_best(self, iteration: int) -> bool:
        """Whether the held-out judge has just liked the policy better than ever before."""
        best = self._best_look()
        return best is not None and (best["step"], best["rolled_back"]) == (iteration, self.rolled_back)

    def _best_look(self) -> dict[str, float] | None:
        return max(self.looks, key=lambda look: look["win_rate"], default=None)

    def _follow(self, kl: float, samples: int) -> None:
        """Moves the weight of the KL penalty, and the reference where it follows the policy."""
        self.kl.follow(kl, samples)
        if self.setting.config.reference_ema:
            _move_towards(self.setting, self.setting.config.reference_ema)

    def state(self) -> dict[str, Any]:
        return {
            "kl": self.kl.as_json(),
            "scale": self.scale.as_json() if self.scale else None,
            "first": self.first,
            "rolled_back": self.rolled_back,
            "looks": self.looks,
            "learner": self.learner.state(),
            **self.setting.backbone.training_state(),
        }

    def restore(self, keeper: Checkpoints) -> int | None:
        """Takes everything from the newest checkpoint and returns its iteration; None where there is none."""
        state = keeper.restore()
        if state is None:
            return None
        self.kl.load(state["kl"])
        self.scale = RewardScale(**state["scale"]) if state["scale"] else None
        self.first, self.looks = dict(state["first"]), list(state["looks"])
        self._slow_down(int(state["rolled_back"]))
        self.learner.load(state["learner"])
        self.setting.backbone.load_training_state(state)
        return int(state["step"])

    def go_back(self, keeper: Checkpoints) -> int:
        """Takes everything from a checkpoint that must be there; returns its iteration."""
        iteration = self.restore(keeper)
        assert iteration is not None
        return iteration

    def roll_back(self, keeper: Checkpoints, alarms: Sequence[Alarm]) -> int:
        """Goes back to the newest checkpoint, to learn half as fast from there; returns its iteration.

        Raises:
            LoopError: it went back as often as is sensible.
        """
        times = self.rolled_back + 1
        if times > _MOST_ROLL_BACKS:
            raise _stopped(alarms, f" (after going back {_MOST_ROLL_BACKS} times, to half the learning rate each time)")
        best = self._best_look()
        iteration = self.go_back(keeper)
        if best is not None and best not in self.looks:
            self.looks.append(best)  # its checkpoint is still the best one, though the iterations after it are given up
        self._slow_down(times)
        return iteration

    def _slow_down(self, times: int) -> None:
        self.rolled_back = times
        self.learner.optimizers.scale = 0.5**times


@torch.no_grad()
def _move_towards(setting: Setting, share: float) -> None:
    """The reference takes this share of what parts it from the policy."""
    backbone = setting.backbone
    ours, theirs = backbone.parameters(REFERENCE).values(), backbone.parameters(POLICY).values()
    for own, policy in zip(ours, theirs, strict=True):
        own.lerp_(policy, share)
