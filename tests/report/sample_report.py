"""A report and metrics in the shape that a real run writes, for the tests of the page; figures are plausible and fixed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from selfeval.report.reading import parse_report
from selfeval.report.schema import Report

Figure = dict[str, Any]


def fig(value: float | None, ci_low: float | None, ci_high: float | None, n: int) -> Figure:
    return {"value": value, "ci_low": ci_low, "ci_high": ci_high, "n": n}


def compared(
    value: float, low: float, high: float, n: int, wins: int, losses: int, p: float, finding: str, test: str = "mcnemar_exact"
) -> dict[str, Any]:
    difference = fig(value, low, high, n)
    return {"difference": difference, "wins": wins, "losses": losses, "p_value": p, "test": test, "finding": finding}


def parsed(report: dict[str, Any]) -> Report:
    """Return the report after a round trip through JSON, as readers get it."""
    return parse_report(json.dumps(report))


def sample_report() -> dict[str, Any]:
    """A good run on word problems with gold: the evaluator beats its baselines and the policy improves."""
    return {
        "schema": 1,
        "name": "shop",
        "seed": 0,
        "model": {
            "name": "lab-812k",
            "model_type": "llama",
            "parameters": 812000,
            "precision": "fp32",
            "domain": "word-problems",
            "gold_file": None,
        },
        "evaluator": _evaluator(),
        "verdicts": {
            "judged": 3000,
            "source": "judge",
            "kept": 2700,
            "tie": 120,
            "unsure": 150,
            "unparsable": 30,
            "unreadable_orders": {"cut": 21, "loop": 11, "label_mass": 4, "no_room": 2, "no_lead": 1},
            "kept_share": fig(0.9, 0.889, 0.91, 3000),
            "swap_consistency": fig(0.944, 0.935, 0.952, 3000),
            "probe": {
                "pairs": 16,
                "kept": 13,
                "tie": 1,
                "unsure": 1,
                "unparsable": 1,
                "unreadable_orders": {"cut": 8, "loop": 0, "label_mass": 0, "no_room": 0, "no_lead": 0},
                "agreement": fig(0.871, 0.62, 0.96, 15),
                "shown_first": fig(0.533, 0.46, 0.61, 15),
                "label_mass": fig(0.987, 0.97, 1.0, 15),
                "usable": True,
                "findings": [
                    {
                        "name": "cut",
                        "observation": "8 of 32 orders were cut off at verdicts.max_new_tokens = 256 before a verdict",
                        "remedy": "raise verdicts.max_new_tokens",
                    }
                ],
            },
            "label_accuracy_gold": fig(0.962, 0.954, 0.969, 2700),
        },
        "policy": _policy(),
        "steps": _steps(),
        "replies": {
            "limit": 48,
            "unfinished": fig(0.021, 0.018, 0.025, 4000),
            "unfinished_before": fig(0.031, 0.024, 0.04, 1800),
            "unfinished_after": fig(0.012, 0.008, 0.018, 1800),
            "per_question": {
                "distinct_1": fig(0.612, 0.604, 0.62, 2200),
                "distinct_2": fig(0.748, 0.74, 0.756, 2200),
                "overlap": fig(0.472, 0.463, 0.481, 2200),
                "identical": fig(0.083, 0.076, 0.091, 2200),
            },
        },
        "data": {
            "seeds": 12,
            "questions": 4000,
            "questions_test": 1800,
            "replies": 16000,
            "pairs_train": 2700,
            "pairs_held_out": 300,
        },
        "dropped": _dropped(),
        "samples": samples(),
        "prompts": {"judge.jinja": "{{ question }} A: {{ a }} B: {{ b }}", "chat_template.jinja": ""},
        "time": {
            "questions": 12.3,
            "replies": 31.0,
            "verdicts": 22.4,
            "pairs": 0.4,
            "evaluator": 38.1,
            "policy": 104.6,
            "evaluation": 21.8,
            "report": 0.4,
            "per_verdict": {
                "pairs": 256,
                "evaluator": fig(0.00042, 0.0004, 0.00044, 8),
                "scoring": fig(0.00042, 0.0004, 0.00044, 8),
                "judge": fig(0.0084, 0.0081, 0.0087, 8),
                "judge_over_evaluator": fig(20.0, 18.9, 21.1, 8),
                "judge_over_scoring": fig(20.0, 18.9, 21.1, 8),
            },
            "total": 231.0,
        },
        "memory": {
            "base_bytes": 3300000,
            "adapter_bytes": 900000,
            "weight_copies": 1.0,
            "shared_prompts": True,
            "peak_bytes": 900000000,
            "events": [],
        },
        "servers": [
            {
                "role": "referee",
                "url": "http://localhost:8000/v1",
                "model": "a-larger-model",
                "answers": 812,
                "tokens_read": 123456,
                "tokens_written": 23456,
                "cost": 0.4321,
            }
        ],
        "versions": {
            "selfeval": "0.1.0",
            "torch": "2.8.0",
            "transformers": "4.57.1",
            "peft": "0.17.1",
            "python": "3.11.2",
        },
        "config": {
            "output": "runs/shop",
            "seed": 0,
            "questions": {"count": 4000, "temperature": 1.0, "dedupe": {"threshold": 0.9, "method": "minhash"}},
            "replies": {"per_question": 4, "temperatures": [0.7, 1.0], "max_new_tokens": 48},
            "evaluator": {"members": 1, "rank": 8, "learning_rate": 0.001, "epochs": 2},
            "policy": {
                "algorithm": "ppo",
                "steps": 60,
                "kl_target": 4.0,
                "clip": 0.2,
                "reward_clip": None,
                "whiten": True,
            },
        },
    }


def emptied(value: Any) -> Any:
    """The same report with no cases in any figure."""
    if isinstance(value, dict) and set(value) == {"value", "ci_low", "ci_high", "n"}:
        return fig(None, None, None, 0)
    if isinstance(value, dict) and "finding" in value:
        return {**value, "difference": fig(None, None, None, 0), "p_value": None, "finding": "too_few"}
    if isinstance(value, dict):
        return {key: emptied(inner) for key, inner in value.items()}
    return value


def _evaluator() -> dict[str, Any]:
    levels = (0.52, 0.57, 0.62, 0.67, 0.72, 0.77, 0.82, 0.87, 0.92, 0.975)
    right = (0.5, 0.61, 0.6, 0.7, 0.74, 0.75, 0.84, 0.88, 0.93, 0.986)
    cases = (14, 18, 20, 21, 28, 36, 52, 80, 160, 671)
    return {
        "accuracy_gold": fig(0.931, 0.915, 0.945, 1100),
        "accuracy_judge": fig(0.971, 0.945, 0.985, 300),
        "first_pairs": {
            "accuracy_gold": fig(0.931, 0.915, 0.945, 1100),
            "accuracy_judge": fig(0.971, 0.945, 0.985, 300),
            "gain": None,
            "comparison": None,
        },
        "pairs_trained": 2700,
        "baselines": {
            "longer_wins": fig(0.552, 0.522, 0.581, 1100),
            "first_wins": fig(0.497, 0.468, 0.527, 1100),
            "mean_logprob": fig(0.781, 0.756, 0.804, 1100),
            "ngram": fig(0.612, 0.583, 0.641, 1100),
            "judge": fig(0.894, 0.874, 0.911, 1100),
        },
        "baselines_on": "gold",
        "comparisons": {
            "judge": compared(0.037, 0.019, 0.055, 1100, 71, 30, 0.00005, "better"),
            "ngram": compared(0.319, 0.289, 0.348, 1100, 390, 39, 1e-70, "better"),
            "mean_logprob": compared(0.15, 0.124, 0.177, 1100, 201, 36, 1e-28, "better"),
            "longer_wins": compared(0.379, 0.347, 0.411, 1100, 450, 33, 1e-90, "better", "sign_exact"),
            "first_wins": compared(0.434, 0.4, 0.466, 1100, 516, 39, 1e-100, "better"),
            "chance": compared(0.431, 0.415, 0.445, 1100, 1024, 76, 1e-200, "better", "binomial_exact"),
        },
        "cost": {
            "pairs": 256,
            "evaluator": {"tokens_read": fig(96.0, 95.0, 97.0, 8), "tokens_written": fig(0.0, None, None, 8)},
            "scoring": {"tokens_read": fig(96.0, 95.0, 97.0, 8), "tokens_written": fig(0.0, None, None, 8)},
            "judge": {"tokens_read": fig(180.0, 178.0, 182.0, 8), "tokens_written": fig(84.0, 82.0, 86.0, 8)},
        },
        "ece": fig(0.0143, 0.008, 0.031, 1100),
        "brier": fig(0.0581, 0.047, 0.07, 1100),
        "temperature": 1.31,
        "temperature_pairs": 310,
        "attacks": {
            "against": "right",
            "total": fig(0.93, 0.91, 0.95, 50),
            "kinds": [
                {"kind": "empty", "below": fig(1.0, 0.93, 1.0, 50)},
                {"kind": "plain_right", "below": fig(0.95, 0.85, 0.99, 50)},
            ],
        },
        "members": 1,
        "disagreement": None,
        "risk_coverage": [[k / 20, 0.069 * (k / 20) ** 2.4 + 0.001] for k in range(1, 21)],
        "calibration": [{"confidence": c, "accuracy": a, "n": n} for c, a, n in zip(levels, right, cases, strict=True)],
    }


def labels_of_people() -> dict[str, Any]:
    """The part on labels of people, which most reports do not have."""
    return {
        "pairs": 1800,
        "labelled": 212,
        "decided": 188,
        "ties": 17,
        "skipped": 9,
        "raters": 2,
        "labels": 397,
        "unused": 3,
        "for_training": 24,
        "evaluator": fig(0.904, 0.848, 0.941, 188),
        "judge": fig(0.931, 0.879, 0.962, 186),
        "judge_kept": fig(0.957, 0.909, 0.98, 171),
        "kappa": fig(0.781, 0.69, 0.86, 185),
        "more_labels": 640,
        "gold": False,
        "threshold": {
            "sure": 0.76,
            "error": 0.1,
            "delta": 0.05,
            "pairs": 96,
            "selected": 77,
            "needed": 44,
            "risk": fig(0.026, 0.007, 0.09, 77),
            "bound": 0.099,
            "coverage": fig(0.802, 0.712, 0.87, 96),
        },
    }


def _steps() -> dict[str, Any]:
    return {
        "replies": 390,
        "steps": 1204,
        "labels_gold": fig(0.962, 0.948, 0.975, 195),
        "accuracy_gold": fig(0.918, 0.9, 0.933, 1100),
        "gain": compared(-0.013, -0.027, 0.001, 1100, 30, 44, 0.13, "unclear"),
    }


def changed(*sides: tuple[float, float]) -> dict[str, Figure]:
    """A measure before, after, and their difference, each a value and the reach of its interval."""
    names = ("before", "after", "change")
    return {name: fig(value, value - reach, value + reach, 1000) for name, (value, reach) in zip(names, sides, strict=True)}


def _policy() -> dict[str, Any]:
    return {
        "win_rate": fig(0.767, 0.739, 0.793, 520),
        "win_rate_decisive": fig(0.938, 0.906, 0.959, 320),
        "length_controlled": fig(0.752, 0.722, 0.78, 520),
        "win": 300,
        "tie": 200,
        "loss": 20,
        "unparsable": 3,
        "gold_before": fig(0.412, 0.389, 0.435, 1800),
        "gold_after": fig(0.687, 0.665, 0.708, 1800),
        "gold_gain": fig(0.275, 0.248, 0.301, 1800),
        "comparisons": {
            "gold": compared(0.275, 0.248, 0.301, 1800, 560, 65, 1e-100, "better"),
            "win_rate": compared(0.267, 0.239, 0.293, 520, 300, 20, 1e-60, "better", "sign_exact"),
        },
        "kl": fig(3.42, 3.31, 3.53, 1800),
        "length_ratio": fig(1.04, 1.03, 1.05, 1800),
        "diversity": {
            "questions": 1000,
            "distinct_1": changed((0.082, 0.004), (0.075, 0.003), (-0.007, 0.003)),
            "distinct_2": changed((0.231, 0.006), (0.198, 0.005), (-0.033, 0.006)),
            "self_bleu": changed((0.712, 0.011), (0.768, 0.009), (0.056, 0.012)),
            "vendi": changed((14.21, 0.42), (11.83, 0.39), (-2.38, 0.47)),
            "embedder": "backbone-layer3-mean",
        },
        "overoptimisation": {
            "points": [[0.2 * k, 0.41 + 0.05 * k, 0.41 + 0.05 * k - 0.002 * k * k] for k in range(1, 13)],
            "start": [0.41, 0.41],
            "fit": {
                "evaluator": {"alpha": 0.25, "beta": 0.01, "rmse": 0.01},
                "gold": {"alpha": 0.2, "beta": 0.08, "rmse": 0.012},
            },
            "gap": fig(0.231, 0.2, 0.262, 384),
        },
        "references": {
            "language": "en",
            "metrics": [
                {
                    "name": "bleu",
                    "before": fig(11.42, 9.8, 13.1, 260),
                    "after": fig(18.36, 16.2, 20.7, 260),
                    "difference": fig(6.94, 5.1, 8.9, 260),
                },
                {
                    "name": "rougeL",
                    "before": fig(0.314, 0.297, 0.331, 260),
                    "after": fig(0.402, 0.384, 0.421, 260),
                    "difference": fig(0.088, 0.071, 0.104, 260),
                },
            ],
        },
        "seed_references": {
            "language": "en",
            "metrics": [
                {
                    "name": "chrf",
                    "before": fig(21.4, 18.8, 24.1, 40),
                    "after": fig(28.3, 25.2, 31.7, 40),
                    "difference": fig(6.9, 3.1, 10.8, 40),
                },
            ],
        },
        "watchdogs": [
            {
                "step": 42,
                "name": "length_drift",
                "message": "Replies grew by 12% in ten steps while the score did not.",
                "action": "warn",
            }
        ],
    }


def _dropped() -> dict[str, Any]:
    return {
        "questions": {"duplicate": 120, "too_long": 3, "no_question_mark": 41},
        "verdicts": {"tie": 120, "unsure": 150, "unparsable": 30},
        "examples": [
            {
                "stage": "questions",
                "reason": "duplicate",
                "text": "Mia has 4 pens and buys 7 more. How many pens has she?",
            },
            {"stage": "questions", "reason": "too_long", "text": "Tom has 3 apples and 4 apples and " * 8},
            {"stage": "verdicts", "reason": "unparsable", "text": "Both of the of the better is"},
        ],
    }


def samples() -> list[dict[str, Any]]:
    texts = (
        ("Mia has 14 pens. She gives 5 to Leo and buys 3 more. How many pens has she now?",
         "14 - 5 = 9. 9 + 3 = 11. The answer is 11.", "14 - 5 = 9. 9 + 3 = 12. The answer is 12."),
        ("A box holds 6 eggs. How many eggs are in 7 boxes?",
         "6 x 7 = 42. The answer is 42.", "6 x 7 = 42. The answer is 42."),
        ("Ben had 30 marbles and lost a third of them. How many are left?",
         "30 - 3 = 27. The answer is 27.", "30 / 3 = 10. 30 - 10 = 20. The answer is 20."),
        ("Ana reads 12 pages a day. How many pages does she read in a week?",
         "12 x 7 = 84. The answer is 84.", "12 x 5 = 60. The answer is 60."),
        ("Sam buys 3 pens at 4 coins each and pays with 20 coins. How much change does he get?",
         "3 + 4 = 7. 20 - 7 = 13. The answer is 13.", "3 x 4 = 12. 20 - 12 = 8. The answer is 8."),
        ("Lea shares 24 nuts among 4 friends. How many does each get?",
         "24 - 4 = 20. The answer is 20.", "24 / 4 = 6. The answer is 6."),
        ("Tim runs 5 km on each of 9 days. How far is that?",
         "5 x 9 = 45. The answer is 45.", "5 x 9 = 45. The answer is 45."),
    )  # fmt: skip
    judged = (
        (False, True, -1.23, 2.14, "win"),
        (True, True, 2.31, 2.4, "tie"),
        (False, True, -2.02, 1.76, "win"),
        (True, False, 1.92, -0.4, "loss"),
        (False, True, -1.7, 2.2, "win"),
        (False, True, -2.4, 2.3, "win"),
        (None, None, -0.3, 2.1, "tie"),
    )
    keys = (
        *("question", "before", "after"),
        *("gold_before", "gold_after", "evaluator_before", "evaluator_after", "verdict"),
    )
    return [dict(zip(keys, (*words, *marks), strict=True)) for words, marks in zip(texts, judged, strict=True)]


def sample_metrics() -> dict[str, list[dict[str, Any]]]:
    """Return sixty PPO iterations with realistic noise, from a fixed seed."""
    noise = random.Random(7)
    policy = []
    for step in range(1, 61):
        risen = 1 - math.exp(-step / 18)
        score = -0.8 + 2.7 * risen + noise.gauss(0, 0.16)
        kl = 3.5 * risen + abs(noise.gauss(0, 0.12))
        policy.append(
            {
                "step": step,
                "reward": score - 0.08 * kl,
                "score": score,
                "kl": kl,
                "kl_coefficient": 0.08 + 0.03 * risen,
                "length": 21 + 1.2 * risen + noise.gauss(0, 0.5),
                "entropy": 1.1 - 0.55 * risen + noise.gauss(0, 0.03),
                "similarity": 0.36 - 0.08 * risen,
                "policy_loss": noise.gauss(-0.012, 0.006),
                "value_loss": 0.9 * math.exp(-step / 9) + 0.12 + abs(noise.gauss(0, 0.03)),
                "clip_fraction": 0.08 + noise.gauss(0, 0.015),
                "approximate_kl": 0.008 + abs(noise.gauss(0, 0.002)),
                "explained_variance": 0.75 * risen - 0.1 + noise.gauss(0, 0.04),
                "grad_norm": 0.8 + abs(noise.gauss(0, 0.2)),
                "seconds": 1.7 + abs(noise.gauss(0, 0.08)),
            }
        )
    gold = [
        {"step": step, "gold": 0.41 + 0.27 * (1 - math.exp(-step / 18)) + noise.gauss(0, 0.012), "n": 256}
        for step in range(5, 61, 5)
    ]
    evaluator = [
        {
            "step": step,
            "loss": 0.12 + 0.57 * math.exp(-step / 70) + noise.gauss(0, 0.015),
            "accuracy": 0.96 - 0.4 * math.exp(-step / 60) + noise.gauss(0, 0.015),
            "held_out_accuracy": 0.95 - 0.4 * math.exp(-step / 60) if step % 50 == 0 else None,
        }
        for step in range(10, 341, 10)
    ]
    return {"policy": policy, "evaluation": gold, "evaluator": evaluator}


def write_run(folder: Path, report: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None) -> Path:
    """Write a run folder as the report stage leaves it, and return it."""
    (folder / "metrics").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(sample_report() if report is None else report), encoding="utf-8")
    for stage, rows in (sample_metrics() if metrics is None else metrics).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics" / f"{stage}.jsonl").write_text(text, encoding="utf-8")
    return folder
