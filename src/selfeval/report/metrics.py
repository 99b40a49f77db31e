"""The table of all logged metrics, from which docs/metrics.md is generated.

A stage that logs a new key must add a row; a test compares this table with the keys of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One key of a metrics file.

    Attributes:
        name: the key.
        unit: unit, or empty for a dimensionless number.
        meaning: definition, in Markdown.
        typical: values in a healthy run, and the limit of the watchdog if there is one.
    """

    name: str
    unit: str
    meaning: str
    typical: str


METRICS: dict[str, tuple[Metric, ...]] = {
    "evaluator": (
        Metric("step", "", "gradient step, from 1", ""),
        Metric(
            "loss",
            "nats per pair",
            "Bradley-Terry loss plus the centering term, on the step's batch, before its update",
            "0.693 at step 1, then falling; the entropy of the labels is its floor",
        ),
        Metric(
            "accuracy",
            "share",
            "pairs of the batch whose chosen reply scores strictly higher, before the update",
            "0 at step 1 (the head starts at zero), then well above 0.5. Measures agreement with the judge on training pairs",
        ),
        Metric("grad_norm", "", "norm of the gradient before clipping", "finite, steady"),
        Metric("learning_rate", "", "learning rate of this step", "rises over the warm-up, then falls"),
        Metric(
            "held_out_loss",
            "nats per pair",
            "the same loss on the held-out pairs, after the update, at the measured steps of `evaluator.early_stopping`",
            "below 0.693. Where it rises, later steps fit the training pairs only; the weights of its minimum are kept",
        ),
    ),
    "steps": (
        Metric("step", "", "gradient step, from 1", ""),
        Metric(
            "loss",
            "nats per step of a reply",
            "cross-entropy with the labels of the steps, on the batch, before its update",
            "0.693 at step 1, then falling; the entropy of soft labels is its floor",
        ),
        Metric(
            "accuracy",
            "share",
            "steps of the batch whose score and label are on the same side of one half, before the update",
            "rises above 0.5. Measures agreement with the labels, not with gold",
        ),
        Metric("grad_norm", "", "norm of the gradient before clipping", "finite, steady"),
        Metric("learning_rate", "", "learning rate of this step", "rises over the warm-up, then falls"),
    ),
    "policy": (
        Metric("step", "", "iteration, from 1", ""),
        Metric("score", "score", "mean raw evaluator score of the iteration's replies", "rises, then flattens"),
        Metric(
            "reward",
            "deviations of the first iteration's scores",
            "mean reward of a reply: its whitened and clipped score, minus the penalties for unfinished and overlong replies, "
            "minus `kl_coefficient` times its KL",
            "near 0 at first, then rises",
        ),
        Metric(
            "kl",
            "nats per reply",
            "mean over replies of the summed log-ratio to the reference, on the drawn tokens, at the policy's temperature",
            "near 0 at first, then approaches `policy.kl_target`. Watchdogs: below -0.5, above 5 times the target",
        ),
        Metric(
            "kl_coefficient",
            "reward per nat",
            "weight of the KL penalty in this iteration",
            "changes while the KL is off its target, then constant",
        ),
        Metric(
            "length",
            "tokens per reply",
            "mean, end-of-sequence token and thinking included",
            "steady. Watchdog: outside 0.5 to 2 times the first iteration's",
        ),
        Metric(
            "repeated",
            "share",
            "share of the iteration's questions whose reply is the most common one",
            "small. Watchdog: above a half, with eight questions or more",
        ),
        Metric(
            "similarity",
            "",
            "mean cosine similarity of the token bigrams of replies to different questions; absent with one question per "
            "iteration",
            "steady. Watchdog: 1 minus it below a quarter of the first iteration's, or it above 0.95² and 1 minus it below "
            "2 / `length`, with eight questions or more",
        ),
        Metric(
            "value",
            "whitened reward",
            "(learners with a critic) mean of the critic's values before the update",
            "follows the returns",
        ),
        Metric(
            "explained_variance",
            "share, at most 1",
            "(learners with a critic) share of the variance of the returns that the values before the update explain; `null` "
            "if the returns do not vary",
            "above 0, rising",
        ),
        Metric(
            "policy_loss",
            "",
            "loss of the learner: the clipped surrogate, the negative log-prob (raft), the loss of the pairs (dpo)",
            "around 0 for the surrogate; falls for raft and dpo",
        ),
        Metric(
            "pair_accuracy",
            "share",
            "(dpo) pairs of the batch whose order under the policy, relative to the reference, agrees with the label",
            "0 at first (all margins are zero), then well above 0.5",
        ),
        Metric(
            "value_loss",
            "squared whitened reward",
            "clipped value loss, with its factor 1/2, mean over tokens",
            "falls, then steady",
        ),
        Metric(
            "entropy",
            "nats per token",
            "mean entropy of the policy's next-token distributions at its temperature",
            "falls slowly. Watchdog: below 2% of the first iteration's",
        ),
        Metric("clip_fraction", "share of tokens", "tokens on which the clipped loss is the larger one", "below about 0.2"),
        Metric(
            "approximate_kl",
            "nats per token",
            "between the policy that sampled the replies and the one being updated",
            "below about 0.05",
        ),
        Metric(
            "step_kl",
            "nats per token",
            "`trpo`: exact KL of the step over all replies of the iteration",
            "at most `step_kl_bound`",
        ),
        Metric(
            "step_kl_bound",
            "nats per token",
            "`trpo`: the bound in this iteration, `policy.trpo.trust_region` times the square of the schedule's factor",
            "falls with the schedule",
        ),
        Metric(
            "step_fraction",
            "share",
            "`trpo`: fraction of the natural step that the line search accepted; 0 if none",
            "0.2 to 1",
        ),
        Metric("surrogate_gain", "advantage per token", "`trpo`: gain of the surrogate by the step", "above 0"),
        Metric("cg_residual", "share", "`trpo`: share of the gradient that conjugate gradient left unsolved", "below 1"),
        Metric(
            "first_ratio",
            "share",
            "mean absolute distance of the probability ratio from 1 at the first minibatch, before any update",
            "close to 0. Watchdog: above 0.02",
        ),
        Metric(
            "engine_difference",
            "nats per token",
            '(with `backbone.engine = "vllm"`, as the four below) mean absolute difference between the log-probs of the engine '
            "and of the base",
            "close to 0. Watchdog: above 0.05",
        ),
        Metric("engine_max_difference", "nats", "the largest such difference of a token", "below 1"),
        Metric(
            "engine_kl",
            "nats per token",
            "estimate (k3) of the KL from the distribution of the base to that of the engine",
            "close to 0",
        ),
        Metric("engine_weight", "ratio", "mean truncated importance weight of a token", "close to 1"),
        Metric(
            "engine_truncated",
            "share",
            "tokens whose importance weight was truncated at `backbone.vllm.max_weight`",
            "close to 0",
        ),
        Metric(
            "q_loss",
            "",
            "value learners: Huber loss of the Q roles, mean over tokens",
            "falls, then steady",
        ),
        Metric(
            "state_loss",
            "",
            "value learners: loss of the values of states, mean over tokens",
            "falls, then steady",
        ),
        Metric(
            "q",
            "whitened reward",
            "value learners: mean value of the drawn tokens",
            "rises with the reward, and stays below the best reward",
        ),
        Metric("grad_norm", "", "norm of the policy's gradient before clipping", "finite, steady"),
        Metric(
            "learning_rate",
            "",
            "learning rate of the policy in this iteration; the critic's follows the same schedule from its own peak",
            "rises over the warm-up, then falls",
        ),
        Metric(
            "judge_win_rate",
            "share",
            "(every `policy.judge_every` iterations) mean probability, by the held-out judge, that the policy's "
            "reply beats the initial policy's",
            "rises with the score",
        ),
        Metric("judge_error", "share", "standard error of `judge_win_rate`", ""),
        Metric(
            "judge_unparsed",
            "share",
            "questions whose verdict could not be read; they are left out",
            "near 0; if most cannot be read, nothing is logged",
        ),
        Metric(
            "judge_drop",
            "share",
            "decrease of the win rate from its best so far",
            "0, or within noise. Watchdog: see `judge_drop_p`",
        ),
        Metric(
            "judge_drop_p",
            "",
            "p-value of that drop: exact sign test on the same questions",
            "Watchdog: at most 5%, divided by the number of pairs of readings during training, while `score_gain` is above 0",
        ),
        Metric("score_gain", "score", "mean raw score now minus that at the judge's best win rate", ""),
        Metric("seconds", "s", "duration of the whole iteration: sampling, scoring and update", ""),
    ),
    "evaluation": (
        Metric("step", "", "policy iteration", ""),
        Metric(
            "gold",
            "share",
            "actual accuracy: share of right replies, by gold, among the first `evaluation.gold_replies` of the iteration "
            "whose question has gold; training questions, at the policy's temperature",
            "rises with the score. A score that rises while gold falls means that the evaluator is being exploited",
        ),
        Metric(
            "expected",
            "share",
            "predicted accuracy of the same replies: their evaluator scores mapped to the probability of being "
            "right by gold, by a logistic fit on the first iteration",
            "close to `gold`. Above it: the evaluator is being exploited",
        ),
        Metric("n", "", "number of those replies", ""),
    ),
    "watchdogs": (
        Metric("step", "", "policy iteration", ""),
        Metric(
            "name",
            "",
            "`not_finite`, `ratio_not_one`, `engine_disagrees`, `negative_kl`, `kl_runaway`, `length_drift`, "
            "`entropy_collapse`, `repeated_reply`, `diversity_collapse`, `judge_disagrees`",
            "",
        ),
        Metric("message", "", "observation, in a sentence", ""),
        Metric("action", "", "`warn`, `roll_back`, `finish` or `stop`", ""),
    ),
}
"""The metrics of each stage, in the order of `metrics/<stage>.jsonl`."""
