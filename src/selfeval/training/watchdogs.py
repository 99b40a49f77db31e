"""Watchdogs: checks on the metrics of an iteration, each with the action to take if it fails.

| action      | effect                                                                                     |
|-------------|--------------------------------------------------------------------------------------------|
| `warn`      | continue                                                                                   |
| `roll_back` | restore the last good checkpoint and halve the learning rate; at most three times          |
| `finish`    | restore the checkpoint with the best reading of the held-out judge and end the training    |
| `stop`      | raise an error, because the metrics cannot be trusted                                      |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfeval.config import PolicyConfig
from selfeval.errors import NotFiniteError
from selfeval.quality.comparisons import LEVEL

__all__ = ["Alarm", "check_iteration", "not_finite", "refuse_broken"]

_MAY_BE_UNDEFINED = ("explained_variance",)
"""Metrics that may be NaN: if all returns are equal there is no variance to explain."""
_FEWEST_QUESTIONS = 8
"""With fewer questions per iteration, the same reply may be correct for all of them."""
_DIVERSITY_LEFT = 0.25
"""Share of the first iteration's diversity below which the replies are too similar."""
_ONE_REPLY = 0.95**2
"""Similarity above which the replies are too similar whatever that of the first iteration. If a share p of the questions gets
one reply, and the others get replies unlike it and each other, the mean over pairs of questions is p²."""


@dataclass(frozen=True)
class Alarm:
    """A problem found by a watchdog; `action` is `warn`, `roll_back`, `finish` or `stop` (see the module docstring)."""

    step: int
    name: str
    message: str
    action: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Figures = Mapping[str, float]
Seen = tuple[str, str] | None
"""Message and action of a watchdog that found a problem, or None."""


def check_iteration(values: Figures, first: Figures, config: PolicyConfig) -> list[Alarm]:
    """Check the metrics of one iteration.

    Args:
        values: metrics of this iteration.
        first: metrics of the first iteration.
        config: the targets; `watchdogs = "warn"` reports problems without acting on them.
    """
    step = int(values["step"])
    try:
        refuse_broken(values)
    except NotFiniteError as error:
        return [not_finite(step, str(error))]
    seen = {name: watchdog(values, first, config) for name, watchdog in _WATCHDOGS.items()}
    alarms = [Alarm(step, name, *found) for name, found in seen.items() if found]
    if config.watchdogs == "warn":
        return [replace(alarm, action="warn") for alarm in alarms]
    return alarms


def refuse_broken(values: Figures) -> None:
    """Raise an error if a metric is not finite.

    Raises:
        NotFiniteError: a metric is NaN or infinite, other than `explained_variance`, which is undefined for constant returns.
    """
    broken = sorted(name for name, value in values.items() if name not in _MAY_BE_UNDEFINED and not math.isfinite(value))
    if broken:
        raise NotFiniteError(f"{', '.join(broken)} is NaN or infinite")


def not_finite(step: int, what: str) -> Alarm:
    """Return the alarm for non-finite numbers.

    Args:
        step: the iteration.
        what: the part of the message that names them.
    """
    return Alarm(step, "not_finite", f"{what}; lower the learning rates", "roll_back")


def _ratio_not_one(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    gap = values.get("first_ratio", 0.0)  # learners without an importance ratio do not report one
    if gap <= 0.02:
        return None
    text = (
        f"before any update, the policy's probabilities differ by {gap:.3f} from the sampled ones; sampling and scoring "
        "disagree"
    )
    return text, "stop" if gap > 0.5 else "warn"


def _engine_disagrees(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    gap = values.get("engine_difference", 0.0)  # reported only if another engine sampled the replies
    if gap <= 0.05:
        return None
    return (
        f"the log-probs of the engine that sampled the replies differ from the base's by {gap:.3f} nats per token; "
        f"{values['engine_truncated']:.1%} of the importance weights were truncated",
        "warn",
    )


def _negative_kl(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    # A true KL is never negative. The estimate k1 may be, by chance, but a mean this low means wrong log-probs.
    kl = values["kl"]
    if kl >= -0.5:
        return None
    return f"KL to the reference is {kl:.2f}; the sampled and scored distributions differ", "stop" if kl < -5 else "warn"


def _kl_runaway(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    times = values["kl"] / config.kl_target
    if times <= 5:
        return None
    text = (
        f"KL {values['kl']:.1f} is {times:.1f} times its target {config.kl_target}; raise kl_coefficient or lower the "
        "learning rate"
    )
    return text, "roll_back" if times > 10 else "warn"


def _entropy_collapse(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    if values["entropy"] >= 0.02 * first["entropy"]:
        return None
    text = f"entropy fell to {values['entropy']:.4f} nats per token, from {first['entropy']:.4f}; set entropy_floor"
    return text, "roll_back"


def _length_drift(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    ratio = values["length"] / max(1.0, first["length"])
    if 0.5 <= ratio <= 2.0:
        return None
    remedy = "set length_guard" if ratio > 1 else "lower learning_rate"  # the guard only holds back longer replies
    text = f"replies are {ratio:.2f} times as long as at the start; {remedy}"
    return text, "warn" if 0.25 <= ratio <= 4.0 else "roll_back"


def _repeated_reply(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    share = values["repeated"]
    # Relative to the start, because some policies begin with the same short answer to many questions.
    if config.questions_per_iteration < _FEWEST_QUESTIONS or share <= max(0.5, 2 * first["repeated"]):
        return None
    return (
        f"the same reply is given to {share:.0%} of the questions; raise kl_coefficient or lower the learning rate",
        "roll_back",
    )


def _diversity_collapse(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    # Absent in checkpoints of earlier versions, and with one question per iteration.
    start, now = first.get("similarity"), values.get("similarity")
    if start is None or now is None or config.questions_per_iteration < _FEWEST_QUESTIONS:
        return None
    # No roll-back: in a domain with a fixed form of replies, such a similarity can be right.
    if 1 - now < _DIVERSITY_LEFT * (1 - start):
        return f"{_similar(now, start)}. {_with_score(values['score'], first['score'])}", "warn"
    # A start that has collapsed already cannot lose three quarters of its diversity. The second condition spares long replies
    # of a fixed form: of L bigrams, one other token changes two.
    if now > _ONE_REPLY and 1 - now < 2 / max(1.0, values["length"]):
        return f"{_similar(now, start)}. Look at the samples: are the same replies right for all questions?", "warn"
    return None


def _similar(now: float, start: float) -> str:
    return f"replies to different questions are nearly the same: similarity {now:.2f}, {start:.2f} at the start"


def _with_score(now: float, start: float) -> str:
    """Return how the score changed in the meantime, and the setting to try. Neither shows the cause."""
    if now > start:
        return f"The mean score rose from {start:.2f} to {now:.2f}: if it rewards such replies, raise kl_coefficient"
    return (
        f"The mean score did not rise ({start:.2f} at the start, {now:.2f} now): if the updates are too large, lower "
        "learning_rate"
    )


def _judge_disagrees(values: Figures, first: Figures, config: PolicyConfig) -> Seen:
    # Overoptimisation is a rising score with a falling win rate. If both fall, the evaluator is not being exploited.
    if "judge_win_rate" not in values or values["score_gain"] <= 0 or values["judge_drop"] <= 0:
        return None
    # The best reading is a maximum over all readings, so this is a multiple test. A Bonferroni correction over all pairs of
    # readings ends a training in which nothing changes in at most 5% of cases, however often the judge is asked.
    readings = max(2, config.iterations // (config.judge_every or 1))
    if values["judge_drop_p"] > LEVEL / math.comb(readings, 2):
        return None
    text = (
        f"since the held-out judge's best win rate, the evaluator's score rose by {values['score_gain']:.2f} and the win "
        f"rate fell by {values['judge_drop']:.2f}, to {values['judge_win_rate']:.2f}: the policy exploits the evaluator"
    )
    return text, "finish"


_WATCHDOGS: dict[str, Callable[[Figures, Figures, PolicyConfig], Seen]] = {
    "ratio_not_one": _ratio_not_one,
    "engine_disagrees": _engine_disagrees,
    "negative_kl": _negative_kl,
    "kl_runaway": _kl_runaway,
    "entropy_collapse": _entropy_collapse,
    "length_drift": _length_drift,
    "repeated_reply": _repeated_reply,
    "diversity_collapse": _diversity_collapse,
    "judge_disagrees": _judge_disagrees,
}
