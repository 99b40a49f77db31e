"""Write the figures of README, model card and docs from results/*.json.

python benchmarks/figures.py [--check]
"""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from scale_tables import check_tables, efficiency_plot, limits_tables, predicted_tables

from selfeval.quality.statistics import proportion, spearman
from selfeval.report.charts import Line, line_chart

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "docs"))

from translations import localized, with_translation  # noqa: E402

_README = _ROOT / "README.md"
_CARD = _ROOT / "src" / "selfeval" / "lab" / "word_problems" / "README.md"
_LONG = _ROOT / "docs" / "concepts" / "long-context.md"
_COST = _ROOT / "docs" / "concepts" / "cost.md"
_CONTROL = _ROOT / "docs" / "algorithms" / "control-check.md"
_STABILITY = _ROOT / "docs" / "algorithms" / "stability.md"
_LEARNERS = _ROOT / "docs" / "algorithms" / "learners.md"
_LOOP = _ROOT / "docs" / "concepts" / "loop.md"
_SPARSE = _ROOT / "docs" / "algorithms" / "sparse-reward.md"
_OVER = _ROOT / "docs" / "algorithms" / "over-optimisation.md"
_FINE_TUNING = _ROOT / "docs" / "concepts" / "fine-tuning.md"
_QUESTIONS = _ROOT / "docs" / "concepts" / "questions.md"
_EMBEDDINGS = _ROOT / "docs" / "concepts" / "embeddings.md"
_STEPS = _ROOT / "docs" / "algorithms" / "steps.md"
_ROLES = _ROOT / "docs" / "concepts" / "roles.md"
_SCALE_MODEL = _ROOT / "docs" / "concepts" / "scale.md"
_MEMORY = _ROOT / "docs" / "concepts" / "memory.md"
_SPEED = _ROOT / "docs" / "concepts" / "speed.md"
_HUMAN = _ROOT / "docs" / "concepts" / "judge-benchmark.md"
_CHECK = _ROOT / "docs" / "guides" / "check.md"
_SEARCH = _ROOT / "docs" / "guides" / "search.md"
_SCALE = _ROOT / "docs" / "guides" / "scale.md"
_SERVE = _ROOT / "docs" / "guides" / "serve.md"
_STORAGE = _ROOT / "docs" / "guides" / "storage.md"
_WHICH_JUDGE = _ROOT / "docs" / "guides" / "which-judge.md"
_JUDGING = _ROOT / "docs" / "algorithms" / "judging.md"
_EVIDENCE = _ROOT / "docs" / "concepts" / "evidence.md"
_EVALUATOR = _ROOT / "docs" / "algorithms" / "evaluator.md"
_TEXT_METRICS = _ROOT / "docs" / "concepts" / "text-metrics.md"
_PLOT = _LONG.with_suffix(".svg")
_BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
_ROWS = (
    ("evaluator picks the right one of two replies (gold, unfiltered held-out pairs)", "evaluator_gold"),
    ("… the judge it learned from, asked in both orders, forced to choose", "baseline_judge"),
    ("… mean log-probability", "baseline_mean_logprob"),
    ("… the longer reply", "baseline_longer_wins"),
    ("… the first reply", "baseline_first_wins"),
    ("evaluator minus its judge, same pairs", "evaluator_less_judge"),
    ("evaluator agrees with the judge where the judge was sure", "evaluator_judge"),
    ("verdicts kept", "kept_share"),
    ("kept labels that are right (gold)", "kept_labels_right"),
    ("replies right at temperature 1, before (gold)", "gold_before"),
    ("replies right at temperature 1, after (gold)", "gold_after"),
    ("gold accuracy, after minus before, same questions", "gold_gain"),
    ("win rate, after vs. before, ties count half", "win_rate"),
    ("win rate, after vs. before, ties dropped", "win_rate_decisive"),
    ("length-controlled win rate", "length_controlled"),
)
_PLAIN = (("KL to the start, nats per reply", "kl"), ("reply length, ratio of after to before", "length_ratio"))


def _load(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((_ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return values


def _row(label: str, runs: list[dict[str, Any]], name: str, percent: bool) -> str:
    def write(value: float) -> str:
        return f"{100 * value:.1f}%" if percent else f"{value:.2f}"

    values = [run[name]["value"] for run in runs]
    low, high, n = (min(run[name]["ci_low"] for run in runs), max(run[name]["ci_high"] for run in runs), runs[0][name]["n"])
    spread = f"{write(min(values))} to {write(max(values))}"
    return f"| {label} | {write(statistics.median(values))} | {spread} | {write(low)} to {write(high)} | {n:,} |"


def _pooled_row(label: str, runs: list[dict[str, Any]], name: str) -> str:
    """Return a row of the cases of all runs. Runs have different questions, so their cases are independent."""
    right, n = (sum(round(value) for value in values) for values in zip(*_counts(runs, name), strict=True))
    found = _share(right / n, n)
    low, high = (f"{100 * found[key]:.1f}%" for key in ("ci_low", "ci_high"))
    return f"| {label} | {100 * found['value']:.1f}% | | {low} to {high} | {n:,} |"


def _counts(runs: list[dict[str, Any]], name: str) -> list[tuple[float, int]]:
    return [(run[name]["value"] * run[name]["n"], run[name]["n"]) for run in runs]


def table() -> str:
    """Return the table of the README, from results/loop.json."""
    loop = _load("loop")
    runs = loop["runs"]
    seconds, peak = ([run[key] for run in runs] for key in ("seconds", "peak_gib"))
    machine = loop["machine"]
    lines = [
        f"Median of {len(runs)} seeds on {machine['cores']} CPU cores without a GPU ({machine['memory_gib']:.0f} GiB), "
        f"by `{loop['command']}`. The last interval spans the 95% intervals of all seeds; n is that of seed {runs[0]['seed']}.",
        "",
        "| | median | over seeds | intervals | n |",
        "|---|---|---|---|---|",
        *(_row(label, runs, name, percent=True) for label, name in _ROWS if name in runs[0]),
        _pooled_row("evaluator picks the right one, the pairs of all seeds together", runs, "evaluator_gold"),
        *(_row(label, runs, name, percent=False) for label, name in _PLAIN),
        "| seconds for the whole loop, while other programs shared the two cores | "
        f"{statistics.median(seconds):.0f} | {min(seconds):.0f} to {max(seconds):.0f} | | |",
        f"| peak memory of the process, GiB | {statistics.median(peak):.2f} | {min(peak):.2f} to {max(peak):.2f} | | |",
        f"| copies of the base weights | {runs[0]['weight_copies']} | | | |",
    ]
    return "\n".join(lines) + "\n"


_SKILLS = {
    "replies_right_sampled": "replies right, sampled at temperature 1",
    "replies_right_greedy": "replies right, greedy",
    "questions_well_posed_free": "questions well posed, written freely",
    "questions_well_posed_with_examples": "questions well posed, after four examples",
    "judge": "judge",
    "referee": "referee (a second judge prompt, for evaluation)",
    "right_first_shown_first": "right verdicts, right reply shown first",
    "right_first_shown_second": "right verdicts, right reply shown second",
    "tie_found": "ties found where both replies are right or both wrong",
    "tie_claimed_wrongly": "ties claimed where exactly one is right",
    "final_marks_right": "right marks at the end of a reply without other marks",
}


def skills_table() -> str:
    """Return the table of the model card, from results/exam.json."""
    exam = _load("exam")
    lines = [f"By `{exam['command']}`, fresh problems.", "", "| skill | share | 95% interval | n |", "|---|---|---|---|"]
    for name, value in exam["skills"].items():
        parts = {name: value} if "value" in value else {f"{name}/{part}": figure for part, figure in value.items()}
        for key, figure in parts.items():
            label = ", ".join(_SKILLS[word] for word in key.split("/"))
            interval = f"{100 * figure['ci_low']:.1f}% to {100 * figure['ci_high']:.1f}%"
            lines.append(f"| {label} | {100 * figure['value']:.1f}% | {interval} | {figure['n']:,} |")
    return "\n".join(lines) + "\n"


_METHODS = ("none", "linear", "dynamic", "yarn")
_MULTIPLES = ("1", "2", "4", "8")


def _perplexity(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2f} ({figure['ci_low']:.2f} to {figure['ci_high']:.2f})"


def long_context_table() -> str:
    """Return the tables of docs/concepts/long-context.md, from results/long_context.json."""
    found = _load("long_context")
    trained, n, tuning = found["trained_length"], found["windows"], found["tuning"]
    head = " | ".join(f"{m}x ({trained * int(m):,})" for m in _MULTIPLES)
    lines = [
        f"By `{found['command']}`: {n} windows of {trained * found['factor']:,} tokens, factor {found['factor']} where nothing "
        f"else is said, {found['cpu_seconds'] / 60:.0f} minutes of one core. Perplexity, with the 95% interval over windows "
        "(bootstrap). "
        f"Tuned: {tuning['steps']} steps, {tuning['tokens']:,} tokens.",
        "",
    ]
    for part, title in (("last", f"the last {found['last_tokens']} tokens, the same at every length"), ("all", "all tokens")):
        lines += [f"| {title} | {head} |", "|---|" + "---|" * len(_MULTIPLES)]
        for name, arm in found["arms"].items():
            cells = [_perplexity(arm[m][part]) if m in arm else "" for m in _MULTIPLES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| tuned, nats per token above `none` at {trained} tokens | {head} |", "|---|" + "---|" * len(_MULTIPLES)]
    for method in _METHODS:
        cells = []
        for multiple in _MULTIPLES:
            figure = found["arms"][f"{method}, tuned"][multiple]["last_minus_trained"]
            cells.append(f"{figure['value']:+.3f} ({figure['ci_low']:+.3f} to {figure['ci_high']:+.3f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PLOT_STYLE = """
svg { font: 11px system-ui, sans-serif; --ink: #1d2126; --soft: #59626c; --grid: #d9d9d4; --c0: #98a1aa; --c1: #0b63a5;
  --c2: #c4560a; --c3: #0b7a5c; --c4: #93468a; }
@media (prefers-color-scheme: dark) { svg { --ink: #e7e8e6; --soft: #a0a8b0; --grid: #33383d; --c0: #7c8790; --c1: #68b5f2;
  --c2: #f39a55; --c3: #4cc7a1; --c4: #d79bd0; } }
text { fill: var(--soft); } .title { font-size: 13px; fill: var(--ink); } .start { text-anchor: start; }
.middle { text-anchor: middle; } .end { text-anchor: end; } line, path { fill: none; } .grid { stroke: var(--grid); }
.axis { stroke: var(--c0); } .line { stroke-width: 2; } .dashed { stroke-dasharray: 6 4; } .probe, .readout { display: none; }
line.c1, path.c1 { stroke: var(--c1); } line.c2, path.c2 { stroke: var(--c2); } line.c3, path.c3 { stroke: var(--c3); }
line.c4, path.c4 { stroke: var(--c4); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.dot.c4 { fill: var(--c4); }
"""


def long_context_plot() -> str:
    """Return the plot of docs/concepts/long-context.md: loss of the last tokens over context, before and after tuning."""
    found = _load("long_context")
    panels = []
    for ending, title in (("", "scaled at load"), (", tuned", f"after {found['tuning']['steps']} adapter steps")):
        lines = [
            Line(m, [(float(k), math.log(v["last"]["value"])) for k, v in found["arms"][m + ending].items()]) for m in _METHODS
        ]
        chart = line_chart(lines, label=f"Loss in nats per token, {title}", x_label="times the trained length")
        panels.append((f"Loss, nats per token: {title}", chart))
    return _side_by_side(panels)


def _side_by_side(panels: list[tuple[str, str]]) -> str:
    """Combine titled charts into one file, two per row."""
    body = []
    for number, (title, chart) in enumerate(panels):
        x, y = 380 * (number % 2), 250 * (number // 2)
        body.append(f'<text class="title" x="{x + 46}" y="{y + 16}">{title}</text>')
        body.append(chart.replace("<svg ", f'<svg x="{x}" y="{y + 24}" width="360" height="210" ', 1))
    height = 250 * ((len(panels) + 1) // 2) - 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 {height}" width="750" height="{height}">'
    drawn = "\n".join(body)
    return f"{head}\n<style>{_PLOT_STYLE}</style>\n{drawn}\n</svg>\n"


_VARIANTS = {
    "ours-ppo": "this package, PPO: policy, reference, evaluator, critic",
    "ours-rloo": "this package, RLOO: policy, reference, evaluator",
    "ours-sft": "this package, supervised LoRA",
    "plain-sft": "transformers and PEFT, supervised LoRA",
    "trl-ppo": "TRL 1.12, PPO, as its documentation has it (critic trained in full)",
    "trl-ppo-lora-critic": "TRL 1.12, PPO, LoRA critic",
    "trl-rloo": "TRL 1.16, RLOO with a reward model",
    "trl-grpo": "TRL 1.16, GRPO with a reward model",
}


def _mib(found: dict[str, Any], name: str) -> str:
    return f"{found[name] / 2**20:,.0f}" if name in found else ""


def cost_tables() -> str:
    """The tables of docs/concepts/cost.md, from results/roles.json, logprobs.json, precision.json and planner.json."""
    return "\n".join([*_roles_lines(), "", *_logprobs_lines(), "", *_precision_lines(), "", *_planner_lines()]) + "\n"


def _roles_lines() -> list[str]:
    found = _load("roles")
    shape, base = found["shape"], found["variants"]["ours-ppo"]["base_bytes"]
    lines = [
        f"By `{found['command']}`: a random Llama of 100 million parameters ({base / 2**20:,.0f} MiB, fp32), "
        f"{shape['prompts']} prompts of {shape['prompt_tokens']} tokens, replies of {shape['reply_tokens']}, "
        f"rank {shape['rank']}, {shape['epochs']} epochs. MiB; held: weights, adapters, gradients, optimizer.",
        "",
        "| | held | held / base | peak |",
        "|---|---|---|---|",
    ]
    for name, label in _VARIANTS.items():
        variant = found["variants"].get(name, {})
        held = variant.get("non_activation_bytes")
        ratio = f"{held / base:.2f}" if held else ""
        lines.append(f"| {label} | {_mib(variant, 'non_activation_bytes')} | {ratio} | {_mib(variant, 'peak_bytes')} |")
    mixed = found["variants"]["mixed-time"]
    return [
        *lines,
        "",
        f"One pass with rows of four roles takes {mixed['mixed_over_plain']:.2f} of the time of a bare pass over the same "
        f"{mixed['tokens']:,} tokens; four passes one after the other take {mixed['apart_over_plain']:.2f} "
        f"({found['machine']['cores']} core).",
    ]


def _logprobs_lines() -> list[str]:
    found = _load("logprobs")
    lines = [
        f"By `{found['command']}`, vocabulary {found['vocabulary']:,}, {found['on']}.",
        "",
        "| log-probs | tokens | width | asked for | extra peak, MiB | time / plain |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["memory"]:
        lines.append(
            f"| {row['version']} | {row['tokens']:,} | {row['width']:,} | {_asked(row)} | {row['extra_peak_mib']:.0f} | |"
        )
    for row in found["time"]:
        lines.append(f"| {row['dtype']} | {row['tokens']:,} | {row['width']:,} | {_asked(row)} | | {row['ratio']:.2f} |")
    return lines


def _asked(row: dict[str, Any]) -> str:
    return "log-probs" if row["asked"] == "logprobs" else "log-probs, entropy and KL, with gradients"


def _precision_lines() -> list[str]:
    found = _load("precision")
    lines = [
        f"By `{found['command']}`, the embedded model and the evaluator of one run, trained on an fp32 base and loaded on "
        f"others; {found['tokens']:,} reply tokens, {found['pairs']} pairs.",
        "",
        "| base | bytes / fp32 | loss gap | KL from fp32, nats a token | evaluator right | verdicts changed |",
        "|---|---|---|---|---|---|",
    ]
    whole = found["precisions"]["fp32"]["base_bytes"]
    for name, row in found["precisions"].items():
        right = row["evaluator_accuracy"]
        interval = f"{100 * right['value']:.1f}% ({100 * right['ci_low']:.1f}% to {100 * right['ci_high']:.1f}%)"
        lines.append(
            f"| {name} | {row['base_bytes'] / whole:.2f} | {100 * row['loss_gap']:+.2f}% | {row['kl_from_fp32']:.5f} "
            f"| {interval} | {100 * row['verdicts_changed']:.1f}% |"
        )
    return lines


def _planner_lines() -> list[str]:
    found = _load("planner")
    lines = [
        f"By `{found['command']}`: planned peak over measured peak, less one, and the measured peak. On a CPU, of the whole "
        "process, and of what it holds above a warmed process without a model.",
        "",
        "| model | | load | rollout | score | update |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in found["cases"].items():
        for label, words in (("process", "whole process"), ("beside_runtime", "without the runtime")):
            part = case[label]
            cells = [f"{100 * part['error'][p]:+.0f}% of {part['measured_mib'][p]:.0f} MiB" for p in part["error"]]
            lines.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return lines


def control_table() -> str:
    """Return the table of docs/algorithms/control-check.md, from results/control.json."""
    found = _load("control")
    lines = [
        f"By `{found['command']}`: mean return of the greedy policy, with "
        f"Student's 95% interval over seeds; {_control_minutes(found):.0f} minutes of one core in all.",
        "",
        "| task | learner | steps | episodes judged | return | worst and best seed | published: steps, return | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, learners in found["tasks"].items():
        for learner, row in learners.items():
            ours, returns = row["return"], [run["return"] for run in row["runs"]]
            interval = f"{ours['value']:.1f} ({ours['ci_low']:.1f} to {ours['ci_high']:.1f}, n = {ours['n']})"
            published = "; ".join(
                f"{name} {theirs['steps']:,}, {theirs['return']:.1f}" for name, theirs in row["published"].items()
            )
            reached = "; ".join(_reached(name, theirs["return"], ours) for name, theirs in row["published"].items())
            lines.append(
                f"| {task} | {learner.upper()} | {row['settings']['steps']:,} "
                f"| {row['runs'][0]['episodes']:,} a seed | {interval} "
                f"| {min(returns):.1f}, {max(returns):.1f} | {published} | {reached} |"
            )
    return "\n".join([*lines, *_not_measured(found)]) + "\n"


def _not_measured(found: dict[str, Any]) -> list[str]:
    """Return a sentence about missing seeds; empty if there are none."""
    missing = [f"{name} ({count} {'seed' if count == 1 else 'seeds'})" for name, count in found["missing_seeds"].items()]
    return ["", f"Not measured yet: {', '.join(missing)}."] if missing else []


def _control_minutes(found: dict[str, Any]) -> float:
    rows = (row for learners in found["tasks"].values() for row in learners.values())
    return sum(run["cpu_seconds"] for row in rows for run in row["runs"]) / 60


def _reached(name: str, theirs: float, ours: dict[str, Any]) -> str:
    if ours["value"] >= theirs:
        return f"{name}: yes"
    within = ", within the interval" if ours["ci_high"] >= theirs else ""
    return f"{name}: no, short by {theirs - ours['value']:.1f}{within}"


def stability_tables() -> str:
    """The tables of docs/algorithms/stability.md, from results/stability.json and ablations.json, if they exist."""
    return "\n".join([*_stability_lines(), "", *_ablation_lines()]) + "\n"


def _is_measured(name: str) -> bool:
    return (_ROOT / "benchmarks" / "results" / f"{name}.json").is_file()


def _stability_lines() -> list[str]:
    if not _is_measured("stability"):
        return ["The trainings of `python benchmarks/stability.py` have no results yet."]
    found = _load("stability")
    settings, count = ", ".join(found["settings"]), f"{len(found['runs'])} of {found['planned']}"
    lines = [
        f"By `{found['command']}`: PPO, {count} trainings, {settings}; gold by {found['test_questions']} test questions. "
        "Median, and the range over seeds.",
        "",
        "| peak learning rate | trainings | gold before | gold after | KL, last half | final over best, 3 | 6 | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate, row in found["by_rate"].items():
        cells = [_ranged(row, "gold_before", 100, "%"), _ranged(row, "gold_after", 100, "%"), _ranged(row, "kl_last_half")]
        cells += [_ranged(row, "final_over_best_3"), _ranged(row, "final_over_best_6"), f"{row['seconds']:.0f}"]
        lines.append(f"| {rate} | {row['runs']} | {' | '.join(cells)} |")
    lines += ["", "| target | trainings that meet it |", "|---|---|"]
    return [*lines, *(f"| {name} | {value['met']} of {value['runs']} |" for name, value in found["targets"].items())]


def _ablation_lines() -> list[str]:
    if not _is_measured("ablations"):
        return ["Those of `python benchmarks/stability.py --ablations` have none yet either."]
    found = _load("ablations")
    lines = [
        f"By `{found['command']}`: {', '.join(found['settings'])}. Median, and the range over seeds.",
        "",
        "| changed | trainings | gold after | KL, last half | final over best, 6 | rolled back | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["parts"].items():
        if "gold_after" not in row:
            continue
        cells = [_ranged(row, "gold_after", 100, "%"), _ranged(row, "kl_last_half"), _ranged(row, "final_over_best_6")]
        lines.append(f"| {name} | {row['runs']} | {' | '.join(cells)} | {row['rolled_back']} | {row['failed']} |")
    return lines


def _ranged(row: dict[str, Any], name: str, factor: float = 1, unit: str = "") -> str:
    digits = 1 if unit else 2
    value, low, high = (factor * row[name + ending] for ending in ("", "_min", "_max"))
    spread = "" if row.get("runs") == 1 else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{unit}{spread}"


def learners_table() -> str:
    """Return the table of docs/algorithms/learners.md, from results/learners.json."""
    if not _is_measured("learners"):
        return "The trainings of `python benchmarks/learners.py` have no results yet.\n"
    found = _load("learners")
    rows = found["learners"]
    some = next(iter(rows.values()))
    lines = [
        f"By `{found['command']}` on the embedded model: {some['samples']:,} replies in each training, {some['seeds']} seeds "
        f"with {some['seeds']} evaluators. Means over seeds with their bootstrap interval; gold by plain samples to 500 test "
        "questions; seconds of one core and peak memory of the whole process are medians.",
        "",
        "| learner | gold before | gold after | gain | KL, nats per reply | seconds | peak, MiB | alarms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["gold_after"]["value"]):
        gold = [f"{100 * row['gold_before']['value']:.1f}%", _interval(row["gold_after"]), _interval(row["gain"])]
        rest = [f"{row['kl']:.2f}", f"{row['seconds']:.0f}", f"{row['peak_mib']:,}", ", ".join(row["alarms"]) or "none"]
        lines.append(f"| `{name}` | {' | '.join([*gold, *rest])} |")
    if _is_measured("roles-learners"):
        peaks = _load("roles-learners")
        here = rows["ppo"]["peak_mib"] / rows["rloo"]["peak_mib"]
        lines += [
            "",
            f"The peak of the whole process under PPO is {here:.2f} times that under RLOO here (the aim is 1.10). On a random "
            f"model of 100 million parameters it is {peaks['ppo_over_rloo']:.2f} times, less what the process held before a "
            f"model was loaded (`{peaks['command']}`).",
        ]
    trpo = rows.get("trpo", {})
    if "steps" in trpo:
        lines += [
            "",
            f"Of {trpo['steps']} TRPO steps the largest exact KL was {trpo['largest_step_kl']:.4f} nats per token, and the "
            f"largest share of its bound that a step took {100 * trpo['largest_share_of_bound']:.1f}%.",
        ]
    lines += [f"Failed: {name}." for name in found.get("failed", {})]
    return "\n".join(lines) + "\n"


def rounds_table() -> str:
    """Return the table of docs/concepts/loop.md, from results/rounds.json."""
    found = _load("rounds")
    lines = [
        f"By `{found['command']}` on the embedded model. Evaluators are judged on the test pairs of round 1, by gold.",
        "",
        "| seed, round | verdicts kept | pairs trained on | evaluator right | change to the round before "
        "| replies right, before | after | change | win, tie, loss against the one before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        for row in run["rounds"]:
            evaluator, policy = row["evaluator"], row["policy"]
            gain = "" if evaluator["gain"] is None else _interval(evaluator["gain"])
            counts = f"{policy['win']}, {policy['tie']}, {policy['loss']}"
            cells = [f"{100 * row['kept_share']['value']:.1f}%", f"{evaluator['pairs_trained']:,}"]
            cells += [_interval(evaluator["accuracy_gold_first_pairs"]), gain]
            cells += [_interval(policy[name]) for name in ("gold_before", "gold_after", "gold_gain")]
            lines.append(f"| {run['seed']}, {row['round']} | {' | '.join([*cells, counts])} |")
    return "\n".join(lines) + "\n"


def sparse_table() -> str:
    """Return the table of docs/algorithms/sparse-reward.md, from results/sparse_reward.json."""
    found = _load("sparse_reward")
    replies = found["iterations"] * found["replies"]
    lines = [
        f"By `{found['command']}`, {found['cpu_seconds'] / 60:.0f} minutes of one core: {found['iterations']} iterations of "
        f"{found['replies']} replies each, {replies:,} in all. Found: the rewarded reply has a probability of "
        f"{found['found']} at the end of an iteration. Last columns: medians over seeds.",
        "",
        "| arm | found | after iterations | probability of the rewarded reply at the end | objective, share of the optimum |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["arms"].items():
        when = "" if row["median_found_at"] is None else f"{row['median_found_at']:.0f}"
        share = statistics.median(run["target"] for run in row["runs"])
        gap = statistics.median(row["gap"])
        chance = f"{share:.2f}" if share >= 0.01 else f"{share:.0e}"
        lines.append(f"| {name} | {row['found']} of {row['seeds']} | {when} | {chance} | {max(0.0, 100 * (1 - gap)):.1f}% |")
    lines += [
        "",
        "| added to the reward | largest change of a log-prob of the optimum | objective lost by it |",
        "|---|---|---|",
    ]
    for name, row in found["optima"].items():
        lines.append(f"| {name} | {row['largest_change_of_a_logprob']:.2g} | {row['objective_lost']:.2g} |")
    return "\n".join(lines) + "\n"


def coverage_tables() -> str:
    """Return the tables of docs/concepts/evidence.md, from results/coverage.json."""
    found = _load("coverage")
    sizes = sorted({row["n"] for row in found["intervals"]})
    lines = [
        f"By `{found['command']}`, {found['draws']} draws each (fewer where a statistic is a simulation itself), "
        f"{found['cpu_seconds'] / 60:.1f} minutes of one core. Share of draws whose 95% interval holds the true value:",
        "",
        f"| interval, nominal 95% | {' | '.join(f'n = {n:,}' for n in sizes)} |",
        "|---|" + "---|" * len(sizes),
        *_by_size(found["intervals"], "statistic", sizes),
    ]
    sizes = sorted({row["n"] for row in found["false_claims"]})
    lines += [
        "",
        "Share of draws without a true difference in which one is claimed:",
        "",
        f"| claim, at most 5% | {' | '.join(f'n = {n:,}' for n in sizes)} |",
        "|---|" + "---|" * len(sizes),
        *_by_size(found["false_claims"], "comparison", sizes),
    ]
    return "\n".join(lines) + "\n"


_CHOICES = {
    "steps, min": "step evaluator, `min`",
    "steps, product": "step evaluator, `product`",
    "steps, last": "step evaluator, `last`",
    "outcome": "outcome evaluator, cross-entropy at the last token",
    "outcome, pairs": "outcome evaluator, Bradley-Terry on pairs",
    "majority": "the most frequent answer",
    "first": "the first reply",
    "any": "gold (a right reply exists)",
}


def decoding_table() -> str:
    """Return the table of docs/concepts/roles.md: decode steps without module overhead."""
    if not _is_measured("decoding"):
        return "`python benchmarks/decoding.py` has no results yet.\n"
    found = _load("decoding")
    largest = max(row["largest_difference"] for row in found["steps"])
    lines = [
        f"By `{found['command']}`: the embedded model on one thread, CPU time of a step after 40 to {40 + found['tokens']} "
        f"tokens, medians of {found['rounds']} rounds. The largest difference of a logit is {largest:g}.",
        "",
        "| role | rows | the model's own pass | without module overhead | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        times = f"{row['own_ms']:.1f} ms | {row['step_ms']:.1f} ms"
        lines.append(f"| {row['role']} | {row['rows']} | {times} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def freed_memory_table() -> str:
    """Return the table of docs/concepts/memory.md: CPU time per stage by when freed memory is returned."""
    if not _is_measured("real_model_stages"):
        return "`python benchmarks/real_model_stages.py` has no results yet.\n"
    found = _load("real_model_stages")
    lines = [
        f"By `{found['command']}`, one run each, CPU seconds of one thread, the loading of libraries and model included.",
        "",
        "| stage | returned at once: user | system | page faults | kept for reuse: user | system | page faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in found["after"]["stages"]:
        cells = [stage]
        for arm in ("before", "after"):
            row = found[arm]["stages"][stage]
            cells += [f"{row['user_seconds']:.0f}", f"{row['system_seconds']:.0f}", f"{row['page_faults'] / 1e6:.1f} M"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_table() -> str:
    """Return the table of docs/concepts/speed.md: an iteration of policy learning."""
    if not _is_measured("step"):
        return "`python benchmarks/step.py` has no results yet.\n"
    found = _load("step")
    lines = [
        f"By `{found['command']}`, one thread, CPU seconds of an iteration with 8 replies per question, two epochs and LoRA of "
        "rank 16; medians of the iterations of each process, and of the ratios of the rounds. The limit is the same passes of "
        "the bare model, each prompt read once.",
        "",
        "| model | learner | prompts shared | prompts read with each reply | ratio | TRL | ratio to TRL | ratio to the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in STEP_MODELS if name in found):
        for learner in (learner for learner in ("ppo", "grpo", "rloo") if learner in found[name]):
            lines.append(_step_row(STEP_MODELS[name], learner, found[name][learner]))
    return "\n".join(lines) + "\n"


STEP_MODELS = {
    "embedded": "embedded, prompts of 23, replies of 19 tokens",
    "llama-30m": "Llama, 30M, prompts of 256, replies of 64",
}


def _step_row(model: str, learner: str, found: dict[str, Any]) -> str:
    rounds = found["cpu_seconds"]

    def seconds(side: str) -> str:
        return f"{statistics.median(row[side] for row in rounds):.2f}"

    peer = next((side for side in rounds[0] if side.startswith("trl")), None)
    measured = peer is not None and f"shared_over_{peer}" in found
    theirs = f"{seconds(peer)} ({peer.replace('trl==', '')})" if measured and peer else "not measured"
    over = f"{found[f'shared_over_{peer}']:.2f}" if measured else ""
    apart, limit = found["shared_over_separate"], found["shared_over_limit"]
    values = (model, learner.upper(), seconds("shared"), seconds("separate"), f"{apart:.2f}", theirs, over, f"{limit:.2f}")
    return f"| {' | '.join(values)} |"


_SIDES = ("ours", "hugging_face", "limit")


def side_tables() -> str:
    """Return the tables of docs/concepts/speed.md that compare the best setting of each side, as far as they are measured."""
    blocks = []
    for name in ("rollout", "judging"):
        if _is_measured(name):
            found = _load(name)
            results = [(MODELS_SHORT[model], found[model]) for model in MODELS_SHORT if model in found]
            rows = [row for model, result in results for row in _side_rows(model, result)]
            blocks.append("\n".join([_side_caption(found["command"]), "", *_SIDE_HEAD, *rows]))
    return "\n\n".join(blocks) + "\n" if blocks else ""


MODELS_SHORT = {"embedded": "embedded", "llama-30m": "Llama, 30M", "smollm2-135m": "SmolLM2, 135M"}
_SIDE_HEAD = (
    "| model | work | amount | this package | Hugging Face | limit | Hugging Face over ours | ours over the limit |",
    "|---|---|---|---|---|---|---|---|",
)


def _side_caption(command: str) -> str:
    return (
        f"By `{command}`, CPU seconds of one thread, medians of rounds in which the sides take turns, each side at its fastest "
        "batch size (setting in brackets)."
    )


def _side_rows(model: str, result: dict[str, Any]) -> list[str]:
    """Return a row per comparison of a result, which may hold several results by name."""
    if "comparisons" not in result:
        return [row for name, part in result.items() for row in _side_rows(_named(model, name), part)]
    return [_side_row(model, comparison) for comparison in result["comparisons"]]


def _named(model: str, name: str) -> str:
    return f"{model}, {name.replace('n=', 'replies per prompt: ')}" if name.startswith("n=") else model


def _side_row(model: str, comparison: dict[str, Any]) -> str:
    best = {side["side"]: side for side in comparison["sides"] if side["best"]}
    seconds = {name: side["cpu_seconds"]["median"] for name, side in best.items()}
    cells = [
        f"{seconds[name]:.2f} ({best[name]['setting']})" if name in best and name != "limit" else f"{seconds.get(name, 0):.2f}"
        for name in _SIDES
    ]
    over = f"{seconds['hugging_face'] / seconds['ours']:.2f}" if "hugging_face" in seconds else ""
    limit = f"{seconds['ours'] / seconds['limit']:.2f}"
    amount = f"{comparison['units']:,} {comparison['unit']}"
    return f"| {' | '.join((model, comparison['title'], amount, *cells, over, limit))} |"


def speculation_tables() -> str:
    """Return the tables of docs/concepts/speed.md about drafts: what they cost, how many are correct, and what they save."""
    if not _is_measured("speculation"):
        return "`python benchmarks/speculation.py` has no results yet.\n"
    found = _load("speculation")
    models = {MODELS_SHORT[name]: found["models"][name] for name in MODELS_SHORT if name in found["models"]}
    widths = [width for width in next(iter(models.values()))["costs"][0]["ratios"] if width != "1"]
    tables = [
        [
            f"By `{found['command']}`, CPU time of a decoding step over several tokens per row, over that of a step with one, "
            "on one thread after prompts of 64 tokens, medians.",
            "",
            f"| model | rows | one token | {' | '.join(f'{width} tokens' for width in widths)} |",
            f"|---|---|---|{'---|' * len(widths)}",
            *(_cost_row(model, row, widths) for model, part in models.items() for row in part["costs"]),
        ],
        [
            "Tokens per pass with drafts of the setting `auto`, and the share of drafted tokens that are correct, counted in "
            "replies that were sampled before.",
            "",
            "| model | replies | tokens per pass | correct | … with earlier replies to the same prompt | correct |",
            "|---|---|---|---|---|---|",
            *(_draft_row(model, name, row) for model, part in models.items() for name, row in part["drafts"].items()),
        ],
        [
            "One client: greedy replies one after the other, CPU seconds of one thread, and the time without drafts over that "
            "with them, medians. " + ("All tokens are equal." if _all_equal(models) else "Not all tokens are equal."),
            "",
            "| model | prompts | reply tokens | drafted | correct | off | auto | off over auto |",
            "|---|---|---|---|---|---|---|---|",
            *(_client_row(model, name, row) for model, part in models.items() for name, row in part["one_client"].items()),
        ],
    ]
    return "\n\n".join("\n".join(table) for table in tables) + "\n"


def _all_equal(models: dict[str, Any]) -> bool:
    return all(row["equal"] for part in models.values() for row in part["one_client"].values())


def _cost_row(model: str, row: dict[str, Any], widths: list[str]) -> str:
    ratios = " | ".join(f"{row['ratios'][width]:.2f}" for width in widths)
    return f"| {model} | {row['rows']} | {row['ms']:.1f} ms | {ratios} |"


def _draft_row(model: str, name: str, row: dict[str, Any]) -> str:
    def cells(counts: dict[str, int]) -> str:
        share = f"{100 * counts['correct'] / counts['drafted']:.0f}%" if counts["drafted"] else "no draft"
        return f"{counts['tokens'] / counts['passes']:.2f} | {share}"

    return f"| {model} | {name} ({row['own']['replies']}) | {cells(row['own'])} | {cells(row['together'])} |"


def _client_row(model: str, name: str, row: dict[str, Any]) -> str:
    drafts, seconds = row["drafts"], " | ".join(f"{row['seconds'][setting]:.2f}" for setting in ("off", "auto"))
    cells = (model, name, f"{row['tokens']:,}", f"{drafts['read']:,}", f"{drafts['accepted']:,}", seconds)
    return f"| {' | '.join(cells)} | {row['off_over_auto']:.2f} |"


def growth_table() -> str:
    """Return the table of docs/concepts/speed.md: how time grows with sizes."""
    if not _is_measured("growth"):
        return "`python benchmarks/growth.py` has no results yet.\n"
    found = _load("growth")
    lines = [
        f"By `{found['command']}`, medians of CPU seconds of one thread; the slope is that of log seconds over log size, and "
        "the last one that between the two largest sizes.",
        "",
        "| work | size | sizes | seconds | slope | last slope |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["growth"].items():
        sizes = [int(size) for size in row["seconds"]]
        times = [statistics.median(times) for times in row["seconds"].values()]
        work, unit = name.split(":")[0], f"{row['unit']}; {row['fixed']}" if row["fixed"] else row["unit"]
        span, seconds = f"{sizes[0]:,} to {sizes[-1]:,}", f"{times[0]:.2f} to {times[-1]:.2f}"
        lines.append(f"| {work} | {unit} | {span} | {seconds} | {row['slope']:.2f} | {row['last']:.2f} |")
    return "\n".join(lines) + "\n"


_INDEXES = {"selfeval": "this index", "flat": "all vectors (faiss, flat)", "hnsw": "graph (faiss, HNSW)"}


def index_table() -> str:
    """Return the table of indexes of docs/guides/search.md, from results/index.json."""
    if not _is_measured("index"):
        return "`python benchmarks/index.py` has no results yet.\n"
    found = _load("index")
    rows = [(int(size), kind, row) for kind, sizes in found["index"].items() for size, row in sizes.items()]
    queries = rows[0][2]["recall_at_10"]["n"]
    return "\n".join(
        [
            f"By `{found['command']}`: synthetic vectors of {found['dimensions']} dimensions, {queries} queries, CPU time of "
            "one thread of a shared machine. Memory is that of the built index, and of the index that was opened from its "
            "file and searched.",
            "",
            "| vectors | index | recall@10 | queries/s | seconds to build | MiB built | MiB opened |",
            "|---|---|---|---|---|---|---|",
            *(_index_line(size, kind, row) for size, kind, row in sorted(rows, key=lambda row: row[0])),
            "",
        ]
    )


def _index_line(size: int, kind: str, row: dict[str, Any]) -> str:
    opened = f"{row['searched_mib']:,.0f}" if "searched_mib" in row else "–"
    speed = f"{row['queries_per_second']:,.0f} | {row['build']:,.1f} | {row['mib']:,.0f} | {opened}"
    return f"| {size:,} | {_INDEXES[kind]} | {_figure(row['recall_at_10'])} | {speed} |"


def duplicates_table() -> str:
    """Return the table of near-duplicates of docs/guides/search.md, from results/dedupe.json."""
    if not _is_measured("dedupe"):
        return "`python benchmarks/dedupe.py` has no results yet.\n"
    found = _load("dedupe")
    names = {"exact": "exact index", "minhash": "MinHash"}
    rows = [(int(size), kind, row) for kind, sizes in found["dedupe"].items() for size, row in sizes.items()]
    return "\n".join(
        [
            f"By `{found['command']}`: texts of 8 to 16 words, a tenth of them near-duplicates of others, Jaccard similarity "
            f"of at least {found['threshold']}, CPU time of one thread of a shared machine.",
            "",
            "| texts | index | seconds | MiB | near-duplicates found | of those of the exact index |",
            "|---|---|---|---|---|---|",
            *(
                f"| {size:,} | {names[kind]} | {row['seconds']:,.1f} | {row['mib']:,} | {row['found']:,} | "
                f"{'–' if 'recall' not in row else format(row['recall'], '.2%')} |"
                for size, kind, row in sorted(rows, key=lambda row: row[0])
            ),
            "",
            *_growth_of_duplicates(found["dedupe"]),
        ]
    )


def _growth_of_duplicates(found: dict[str, Any]) -> list[str]:
    """Return a sentence with the slope of log seconds over log size between the two largest sizes of each index."""
    slopes = []
    for kind, rows in found.items():
        ends = sorted((int(size), row["seconds"]) for size, row in rows.items())[-2:]
        if len(ends) == 2:
            (small, fast), (large, slow) = ends
            slope = math.log(slow / fast) / math.log(large / small)
            slopes.append(f"{slope:.2f} for {'the exact index' if kind == 'exact' else 'MinHash'} ({small:,} to {large:,})")
    return [f"Slope of log seconds over log size: {', '.join(slopes)}.", ""] if slopes else []


def steps_tables() -> str:
    """Return the tables of docs/algorithms/steps.md, from results/steps.json."""
    if not _is_measured("steps"):
        return "`python benchmarks/steps.py` has no results yet.\n"
    found = _load("steps")
    labels = found["labels"]
    lines = [
        f"By `{found['command']}` on the embedded model, {found['cpu_seconds'] / 60:.0f} minutes of one core, one seed. "
        f"{labels['steps']:,} steps of replies to {labels['questions']:,} questions, of which {_figure(labels['steps_right'])} "
        f"are right. {labels['questions_with_majority']:,} questions have a majority, which is right in "
        f"{_figure(labels['majority_right'])}. Share of labels on the side of gold (at least one half exactly if the reply is "
        "right so far), with its 95% interval by question:",
        "",
        "| reference | label | completions | agreement with gold | steps | questions |",
        "|---|---|---|---|---|---|",
    ]
    for row in labels["agreement"]:
        figure = row["agreement"]
        names = f"{row['reference']} | {row['label']} | {row['completions']}"
        lines.append(f"| {names} | {_figure(figure)} | {row['steps']:,} | {figure['n']:,} |")
    if "judged" in found:
        lines += ["", _judged_sentence(found["judged"])]
    if "best_of_n" not in found:
        return "\n".join([*lines, "", "Best of n has no results yet."]) + "\n"
    return "\n".join([*lines, "", *_best_of_n_lines(found["trained"], found["best_of_n"])]) + "\n"


def _judged_sentence(judged: dict[str, Any]) -> str:
    above = judged["right_above_wrong"]
    return (
        "Instead of completing a reply, the model can grade its beginning up to each step in one pass, with the judge "
        f"`pointwise` (`python benchmarks/steps.py --only judged`). Of the same {judged['graded']:,} steps, "
        f"{_figure(judged['agreement'])} of the grades are on the side of gold. Of a right and a wrong step of replies to the "
        f"same question, the right one has the higher grade in {_figure(above)}, n = {above['n']:,} questions. A single "
        "completion agrees with gold more often, so the stage does not offer grades as labels."
    )


def _best_of_n_lines(trained: dict[str, Any], best: dict[str, Any]) -> list[str]:
    lines = [
        f"Evaluators trained on the same {trained['replies']:,} replies to {trained['questions']:,} questions: "
        f"{trained['steps']:,} steps with soft labels of {trained['completions']:,} completions; for the pairs, the "
        f"{trained['pairs']:,} questions with a reply that has the majority's answer and one that does not. Right replies of "
        f"those chosen among {best['n']} to each of {best['questions']:,} new questions, and the paired difference from `min`:",
        "",
        "| chosen by | right | `min` minus this |",
        "|---|---|---|",
    ]
    for name, said in _CHOICES.items():
        difference = best["steps_min_minus"].get(name)
        lines.append(f"| {said} | {_figure(best['right'][name])} | {'' if difference is None else _points(difference)} |")
    return lines


def _figure(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "none"
    if figure["ci_low"] is None:  # of clusters that are all alike
        return f"{100 * figure['value']:.1f}%"
    low, high = 100 * figure["ci_low"], 100 * min(figure["ci_high"], 1.0)
    return f"{100 * figure['value']:.1f}% ({low:.1f} to {high:.1f})"


def _points(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:+.1f} points ({100 * figure['ci_low']:+.1f} to {100 * figure['ci_high']:+.1f})"


def attacks_table() -> str:
    """Return the table of evaluators trained with pairs against attacks, from results/attacks.json; empty if not measured."""
    if not _is_measured("attacks"):
        return ""
    found = _load("attacks")
    kinds = ("empty", "other_question", "plain_right", "injection")
    lines = [
        "",
        f"By `{found['command']}` on the recipe `{found['recipe']}`: evaluators on the same judged pairs of the recipe, "
        "with further pairs against replies to other questions (`mismatched`) or attacks, as a share of the judged ones. Share "
        "of test pairs right by gold, and of attack replies that score below a right reply, with intervals over questions.",
        "",
        "| pairs | seed | right | attacks below | … empty | … to another question | … right but plain | … injection |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        for name, row in run["settings"].items():
            below = {kind["kind"]: kind["below"] for kind in row["attacks"]["kinds"]}
            cells = (row["accuracy_gold"], row["attacks"]["total"], *(below[kind] for kind in kinds))
            lines.append(f"| {name} | {run['seed']} | {' | '.join(_figure(cell) for cell in cells)} |")
    return "\n".join([*lines, "", *_evaluator_parts(found)]) + "\n"


def _evaluator_parts(found: dict[str, Any]) -> list[str]:
    """Return the table of the accuracy by gold on parts of the test pairs."""
    parts = ("longer is right", "shorter is right", "judge was sure")
    first = next(iter(found["runs"][0]["settings"].values()))
    lines = [
        f"Of the same evaluators, on all test pairs with one right reply, whatever the judge's verdict (n = "
        f"{first['accuracy_gold']['n']:,}; the judge was sure of {first['parts']['judge was sure']['n']:,}), and the lowest of "
        "the ten families of word problems, of those with at least 100 pairs.",
        "",
        "| pairs | seed | right | where the longer reply is | … the shorter one | where the judge was sure | lowest family |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        for name, row in run["settings"].items():
            families = [(k.removeprefix("family "), v) for k, v in row["parts"].items() if k.startswith("family ")]
            lowest, figure = min(((k, v) for k, v in families if v["n"] >= 100), key=lambda found: found[1]["value"])
            cells = (row["accuracy_gold"], *(row["parts"][part] for part in parts))
            shown = " | ".join(map(_figure, cells))
            lines.append(f"| {name} | {run['seed']} | {shown} | {lowest}: {_figure(figure)} |")
    return lines


def _by_size(rows: list[dict[str, Any]], key: str, sizes: list[int]) -> list[str]:
    """Return one table row per name, with a cell per number of cases."""
    names = dict.fromkeys(row[key] for row in rows)
    cells = {(row[key], row["n"]): f"{100 * row['measured']['value']:.1f}%" for row in rows}
    return [f"| {name} | {' | '.join(cells.get((name, n), '') for n in sizes)} |" for name in names]


def _interval(figure: dict[str, Any]) -> str:
    if figure["ci_low"] is None:  # of clusters that are all alike
        return f"{100 * figure['value']:.1f}%"
    return f"{100 * figure['value']:.1f}% ({100 * figure['ci_low']:.1f} to {100 * figure['ci_high']:.1f})"


def options_table() -> str:
    """Return the table of the options of the evaluator, from results/evaluator_options.json."""
    if not _is_measured("evaluator_options"):
        return "`python benchmarks/evaluator_options.py` has no results yet.\n"
    found = _load("evaluator_options")
    default = found["arms"]["default"]
    lines = [
        f"By `{found['command']}`: the embedded model; the same {found['pairs']} judged pairs for all rows, of which "
        f"{default['counts']['held_out']} are held out with the first seed; {default['accuracy']['n']:,} test pairs with one "
        f"right reply by gold, the longer one in {default['longer_is_right']['n']} and the shorter one in "
        f"{default['shorter_is_right']['n']}; attack replies to {found['attacked_questions']} questions. With several seeds, a "
        "pair counts with the share of them that are right. Differences are paired by pair, of the same seeds, and all "
        "intervals are over pairs, not over seeds. Of calibration error and attacks: the median of the seeds, and the span of "
        "their intervals. Flipped labels are flipped in the held-out pairs too, to which the temperature is fitted.",
        "",
        "| setting | seeds | right | difference | to | right where the longer reply is | … the shorter one | calibration error "
        "| attacks below |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_option_line(name, row) for name, row in found["arms"].items()),
    ]
    return "\n".join(lines) + "\n"


def _option_line(name: str, row: dict[str, Any]) -> str:
    is_default = name == "default"
    against = ["", ""] if is_default else [_points(row["difference"]), row["against"]]
    right = [_interval(row[key]) for key in ("accuracy", "longer_is_right", "shorter_is_right")]
    others = [_interval(_span(row[key])) for key in ("calibration_errors", "attacks")]
    cells = [str(len(row["accuracy_seeds"])), right[0], *against, *right[1:], *others]
    return f"| {name} | {' | '.join(cells)} |"


def _span(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of the same figure of several seeds, and the span of their intervals."""
    return {
        "value": statistics.median(figure["value"] for figure in figures),
        "ci_low": min(figure["ci_low"] for figure in figures),
        # Student's interval of a share may reach beyond 1.
        "ci_high": min(max(figure["ci_high"] for figure in figures), 1.0),
    }


_FAULTS = (
    ("exact match", "paraphrase"),
    ("shingles", "paraphrase"),
    ("paraphrase", "paraphrase"),
    ("exact match", "off_domain"),
    ("off_domain", "off_domain"),
    ("off_domain, LOF 5", "off_domain"),
    ("off_domain, LOF 10", "off_domain"),
    ("exact match", "loop"),
    ("loop", "loop"),
)
"""(Filter, kind of fault) of each row."""


_TARGETS = {"exact match": "paraphrase", "shingles": "paraphrase"} | {
    name: name for name in ("off_domain", "paraphrase", "loop")
}
"""The kind of fault of which a filter has a precision in the results."""


def filters_table() -> str:
    """Return the tables of the filters in docs/concepts/questions.md, from results/domain_filters.json."""
    if not _is_measured("domain_filters"):
        return "`python benchmarks/domain_filters.py` has no results yet.\n"
    found = _load("domain_filters")
    lines = [
        f"By `{found['command']}`, 95% intervals in brackets:",
        "",
        "Recall is the share of the planted faults that the filter drops, and precision the share of these faults among all "
        "that it drops of these and of the real questions.",
        "",
        "| questions | fault | filter | recall | precision | dropped of the real ones |",
    ]
    lines.append("|---|---|---|---|---|---|")
    sets = [(name, part["filters"]) for name, part in found["filters"].items() if isinstance(part, dict)]
    for name, filters in sets:
        for filter_name, kind in _FAULTS:
            outcome = filters[filter_name]
            # `summary` computes precision for the kind of fault that the filter is made for.
            precision = outcome["precision"] if kind == _TARGETS[filter_name.partition(",")[0]] else None
            shown = " | ".join(map(_counted_share, (outcome[kind], precision, outcome["real"])))
            lines.append(f"| {name} | {kind.replace('_', '-')} | {filter_name.replace('_', '-')} | {shown} |")
    parts = (_area_rows, _reply_rows, _pair_rows, _coverage_rows)
    return "\n".join([*lines, *(row for part in parts for row in part(found)), *_domain_loop_rows()]) + "\n"


def _area_rows(found: dict[str, Any]) -> list[str]:
    """Return the areas under the ROC curves of the scores of off-domain questions."""
    sets = {name: part["areas"] for name, part in found["filters"].items() if isinstance(part, dict)}
    names = [name for name, kind in _FAULTS if kind == "off_domain" and name != "exact match"]
    labels = ["distance to the nearest seed", *(name.partition(", ")[2] for name in names[1:])]
    rows = [
        f"| {name} | " + " | ".join(", ".join(f"{area:.3f}" for area in areas[score]) for score in names) + " |"
        for name, areas in sets.items()
    ]
    head = f"| area under the ROC curve, by fold | {' | '.join(labels)} |"
    return ["", head, "|---" * (len(names) + 1) + "|", *rows]


def _reply_rows(found: dict[str, Any]) -> list[str]:
    parts = {name: part for name, part in found["replies"].items() if isinstance(part, dict)}
    rows = [
        f"| {name} | {_interval(part['loop'])}, n = {part['loop']['n']} | {_interval(part['real'])}, n = {part['real']['n']} |"
        for name, part in parts.items()
    ]
    return ["", "| replies, cut off | loops found | dropped of the real ones |", "|---|---|---|", *rows]


def _pair_rows(found: dict[str, Any]) -> list[str]:
    """Return the shares of pairs of the STS benchmark that count as paraphrases; none before they are measured."""
    if "paraphrases" not in found:
        return []
    parts = {name: part for name, part in found["paraphrases"].items() if isinstance(part, dict)}
    names = {"paraphrase": "paraphrases (score of at least 4.5)", "different": "different sentences (below 3)"}
    rows = [
        f"| {names[name]} | {_counted_share(part['shingles'])} | {_counted_share(part['paraphrase'])} |"
        for name, part in parts.items()
    ]
    return ["", "| pairs of the STS benchmark | dropped by shingles | dropped by `paraphrase` |", "|---|---|---|", *rows]


def _counted_share(figure: dict[str, Any] | None) -> str:
    return "–" if figure is None else f"{_interval(figure)}, n = {figure['n']}"


_SPREADS = {
    "well_posed": "well posed",
    "effective_families": "effective number of families (of 10)",
    "phrasings": "phrasings covered",
    "effective_phrasings": "effective number of phrasings",
    "vendi": "Vendi score",
}


def _coverage_rows(found: dict[str, Any]) -> list[str]:
    """Return the medians over seeds, with their range; none before they are measured."""
    if "coverage" not in found:
        return []
    runs, count = found["coverage"]["runs"], found["coverage"]["questions"]
    head = f"| {count} questions of the embedded model, median of {len(runs)} seeds (range) | uniform | `coverage = true` |"
    rows = [
        f"| {label} | " + " | ".join(_spread_cell([run[kind][name] for run in runs]) for kind in ("off", "on")) + " |"
        for name, label in _SPREADS.items()
    ]
    return ["", head, "|---|---|---|", *rows]


_OUTCOMES = {
    "evaluator_gold": "evaluator, accuracy by gold",
    "gold_before": "replies before training, right by gold",
    "gold_after": "replies after training, right by gold",
}


def _domain_loop_rows() -> list[str]:
    """Return what steering changes in the whole loop, and what the parts that are on by default cost; none if not measured."""
    if not _is_measured("domain_loop"):
        return []
    found = _load("domain_loop")
    kinds = [found["steering"].get(kind, {}) for kind in ("uniform", "steered")]
    seeds = sorted(set(kinds[0]) & set(kinds[1]), key=int)
    lines = ["", f"By `{found['command']}`, the whole loop with the embedded model:"]
    if seeds:
        of_seeds = f"mean of seeds {', '.join(seeds)} (range)" if len(seeds) > 1 else f"seed {seeds[0]}"
        head = f"400 training and 400 test questions, {of_seeds}"
        lines += ["", f"| {head} | uniform | `coverage = true` |", "|---|---|---|"]
        for name, label in _OUTCOMES.items():
            cells = [[kind[seed][name]["value"] for seed in seeds] for kind in kinds]
            spans = [f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else "" for values in cells]
            shown = " | ".join(f"{statistics.fmean(v):.1%}{span}" for v, span in zip(cells, spans, strict=True))
            lines.append(f"| {label} | {shown} |")
    costs = [found["cost"].get(kind, {}).values() for kind in ("defaults", "without")]
    if all(costs):
        defaults, without = (statistics.fmean(row["cpu_seconds"] for row in rows) for rows in costs)
        lines += [
            "",
            f"`selfeval run` takes {defaults:.0f} CPU seconds, and {without:.0f} without the map of the report and the search "
            f"for loops in replies: {defaults / without - 1:+.1%}.",
        ]
    return lines


def _spread_cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def questions_table() -> str:
    """Return the tables of docs/concepts/questions.md, from results/real_model.json."""
    if not _is_measured("real_model"):
        return "`python benchmarks/real_model.py` has no results yet.\n"
    found = _load("real_model")
    formats = found["questions"]
    lines = [f"By `{found['command']}`, {found['model']}:", "", "| | one message | example turns |", "|---|---|---|"]
    temperatures = [name for name in formats["turns"] if name.startswith("temperature")]
    for name in temperatures:
        cells = [formats[kind][name] for kind in ("message", "turns")]
        count = cells[0]["usable"]["n"]
        lines.append(f"| usable of {count}, {name} | " + " | ".join(_interval(cell["usable"]) for cell in cells) + " |")
        lines.append(f"| written with a label, {name} | " + " | ".join(str(c["written with a label"]) for c in cells) + " |")
    for name in ("options kept", "code kept"):
        cells = [formats[kind][name] for kind in ("message", "turns")]
        shown = [_interval(c["kept"]) + f", n = {c['kept']['n']}" if c["kept"] else "none were written" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += [
        "",
        f"Samples with example turns, {temperatures[0]}, in the order of sampling:",
        "",
        "| question | outcome |",
        "|---|---|",
    ]
    for sample in formats["turns"][temperatures[0]]["samples"]:
        text = html.escape(sample["text"], quote=False).replace("|", "&#124;").replace("\n", "<br>")
        lines.append(f"| {text} | {sample['outcome']} |")
    return "\n".join(lines) + "\n"


def embedders_tables() -> str:
    """Return the tables of docs/concepts/embeddings.md, from results/embedders.json."""
    if not _is_measured("embedders"):
        return "`python benchmarks/embedders.py` has no results yet.\n"
    found = _load("embedders")
    rows: dict[str, Any] = found["rows"]
    sets = list(next(iter(rows.values()))["sentences"])
    lines = [
        f"By `{found['command']}`: Spearman's correlation of the cosine with the scores of people, on random pairs of each set "
        "of sentences, with bootstrap intervals (95%). Layer and pooling are chosen without the scores, unless one is named.",
        "",
        f"| embedder | pairs of each set | {' | '.join(sets)} |",
        "|---" * (len(sets) + 2) + "|",
        *(_embedder_line(name, row, sets) for name, row in rows.items()),
        *_selection_lines(rows),
        *_word_lines(rows),
    ]
    return "\n".join(lines) + "\n"


def _embedder_line(name: str, row: dict[str, Any], sets: list[str]) -> str:
    shown = f"{name} ({row['pool'].replace('layer', 'layer ').replace('-', ', ')})" if "pool" in row else name
    figures = [row["sentences"][one] for one in sets]
    return f"| {shown} | {figures[0]['n']} | {' | '.join(map(_correlation, figures))} |"


def _correlation(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['ci_low']:.2f} to {figure['ci_high']:.2f})"


def _selection_lines(rows: dict[str, Any]) -> list[str]:
    """Return the check of the choice without labels: what it lost against the best choice with labels."""
    lines = [
        "",
        "The choice without labels: the mean correlation over the four sets of the chosen layer and pooling, of the best and "
        "the worst one by the scores, and the rank correlation of the criterion with it over all layers and poolings:",
        "",
        "| model | chosen | best | worst | criterion and correlation |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if by_layer := row.get("by_layer"):
            chosen = max(by_layer, key=lambda one: float(one["agreement"]))
            ends = [pick(by_layer, key=lambda one: float(one["spearman"])) for pick in (max, min)]
            cells = [f"{one['spearman']:.2f} ({one['pool'].replace('-', ', ')})" for one in (chosen, *ends)]
            rank = spearman([one["agreement"] for one in by_layer], [one["spearman"] for one in by_layer])
            lines.append(f"| {name} | {' | '.join(cells)} | {rank or 0:.2f}, n = {len(by_layer)} |")
    return lines


def _word_lines(rows: dict[str, Any]) -> list[str]:
    static = {name: row for name, row in rows.items() if "words" in row}
    if not static:
        return []
    sets = list(next(iter(static.values()))["words"])
    total = next(iter(static.values()))["corpus_words"]
    lines = [
        "",
        f"Word vectors trained on {total:,} words of public texts (novels, Darwin, Shakespeare, TinyStories): correlation on "
        "pairs whose words both have a vector, right analogies among the 10,000 most frequent words, and CPU seconds of the "
        "training.",
        "",
        f"| embedder | {' | '.join(sets)} | analogies | seconds |",
        "|---" * (len(sets) + 3) + "|",
    ]
    for name, row in static.items():
        words = [f"{_correlation(row['words'][one])}, n = {row['words'][one]['n']}" for one in sets]
        analogies = f"{_interval(row['analogies'])}, n = {row['analogies']['n']}"
        lines.append(f"| {name} | {' | '.join(words)} | {analogies} | {row['seconds']:.0f} |")
    return lines


def check_table() -> str:
    """Return the table of docs/guides/check.md: what the check recommends for models that can and cannot judge."""
    if not _is_measured("check"):
        return "`python benchmarks/check.py` has no results yet.\n"
    found = _load("check")
    titles = {
        "embedded": "embedded model",
        "random": "random Llama",
        "stories260K": "stories260K",
        "smollm2": "SmolLM2-135M-Instruct, general questions",
    }
    lines = [
        f"By `{found['command']}`, on one CPU thread while other programs shared the machine:",
        "",
        "| model | recommended | because | pairs | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["models"].items():
        why = "; ".join(row["reasons"])
        lines.append(
            f"| {titles[name]} | {row['judge'] or 'no run'} | {why} | {row['sizes']['pairs']} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


_PROBABILITIES = {"as it is": "no", "on consistency": "on consistency", "on labels": "on other labels"}


def human_labels_table() -> str:
    """Return the table of a small model's judges on human labels, from results/human_labels.json."""
    if not _is_measured("human_labels"):
        return "`python benchmarks/human_labels.py` has no results yet.\n"
    found = _load("human_labels")
    commands = ", ".join(f"`{data['command']}`" for data in found["sets"].values())
    lines = [
        f"By {commands}: {found['model']}, pairs drawn at random, without reasoning, verdicts kept from a confidence of 0.8 "
        "on. 95% intervals.",
        "",
        "| pairs | judge | calibrated | agreement with people | orders agree | kept | agreement on these | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, data in found["sets"].items():
        for judge, rows in data["judges"].items():
            made = [(kind, rows[kind]) for kind in _PROBABILITIES if kind in rows]
            lines += [f"| {name} | {judge} | {_PROBABILITIES[kind]} | {_judge_cells(row)} |" for kind, row in made]
    rules = {"longer": "the longer reply", "first": "the first reply", "mean_logprob": "the higher mean log-prob"}
    for name, data in found["sets"].items():
        said = "; ".join(f"{text} {_figure(data['baselines'][rule])}" for rule, text in rules.items())
        lines += ["", f"Baselines on the {data['pairs']} pairs of {name}: {said}."]
    return "\n".join(lines) + "\n"


def _judge_cells(row: dict[str, Any]) -> str:
    shown = [row[key] for key in ("agreement", "swap_consistency", "coverage", "agreement_kept", "ece")]
    return " | ".join(f"{_figure(figure)}, n = {figure['n']}" if figure["n"] else "none" for figure in shown)


def judges_by_domain_table() -> str:
    """Return the table of docs/guides/which-judge.md: the same judges in the domains in which they were measured."""
    lines = ["| domain | model | judge | kept | right or agreed | measured by |", "|---|---|---|---|---|---|"]
    rows = [*_embedded_judge_rows(), *_same_pair_rows(), *_vote_rows(), *_human_label_rows()]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _embedded_judge_rows() -> list[tuple[str, ...]]:
    loop = _load("loop")
    return [
        (
            f"word problems of the embedded model, seed {run['seed']}",
            "embedded model",
            "`pairwise`",
            _counted(run["kept_share"]),
            f"kept labels right by gold: {_counted(run['kept_labels_right'])}",
            f"`{loop['command']}`",
        )
        for run in loop["runs"]
    ]


def _same_pair_rows() -> list[tuple[str, ...]]:
    """Return the judges of the embedded model on the same pairs, from results/judges.json."""
    if not _is_measured("judges"):
        return []
    found = _load("judges")
    return [
        (
            "word problems, pairs with exactly one right reply",
            "embedded model",
            name,
            _counted(row["coverage"]),
            f"kept labels right by gold: {_counted(row['agreement_kept'])}; all pairs: {_counted(row['agreement'])}"
            + ("" if name == "pairwise" else f", less `pairwise` {_points(row['less_plain']['difference'])}")
            + (f"; orders agree: {_counted(row['swap_consistency'])}" if row["swap_consistency"]["n"] else ""),
            f"`{found['command']}`",
        )
        for name, row in found["judges"].items()
    ]


def _vote_rows() -> list[tuple[str, ...]]:
    if not _is_measured("real_model_word_problems"):
        return []
    found = _load("real_model_word_problems")
    rows = []
    for run in found["runs"]:
        votes, judged = run["votes"], sum(run["votes"]["states"].values())
        kept = _counted(_share(votes["states"]["kept"] / judged, judged))
        right = f"preferred reply right: {_counted(votes['chosen_right'])}; other reply: {_counted(votes['rejected_right'])}"
        domain = f"word problems of one operation, seed {run['seed']}"
        rows.append((domain, found["model"], "`agreement`", kept, right, f"`{found['command']}`"))
    return rows


def _human_label_rows() -> list[tuple[str, ...]]:
    if not _is_measured("human_labels"):
        return []
    found = _load("human_labels")
    return [
        (
            f"pairs of {name}",
            found["model"],
            f"{judge}, {_CALIBRATED[kind]}",
            _counted(row["coverage"]),
            f"agreement with people on all pairs: {_counted(row['agreement'])}",
            f"`{data['command']}`",
        )
        for name, data in found["sets"].items()
        for judge, rows in data["judges"].items()
        for kind, row in rows.items()
        if kind in _CALIBRATED
    ]


_CALIBRATED = {
    "as it is": "not calibrated",
    "on consistency": "calibrated on consistency",
    "on labels": "calibrated on other labels",
}


def _counted(figure: dict[str, Any]) -> str:
    return f"{_interval(figure)}, n = {figure['n']:,}"


def word_problems_table() -> str:
    """Return the table of docs/algorithms/judging.md: a real model before and after training on its own votes."""
    if not _is_measured("real_model_word_problems"):
        return "`python benchmarks/word_problems.py` has no results yet.\n"
    found = _load("real_model_word_problems")
    runs, questions, evaluation = found["runs"], found["questions"], found["evaluation"]
    minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in runs)
    lines = [
        f"By `{found['command']}`: {found['model']}, {questions['train']} training questions with {found['votes']} votes each, "
        f"{questions['test']} other test questions, answered greedily and with {evaluation['samples']} samples at temperature "
        f"{evaluation['temperature']}; {minutes} minutes (by seed) up to the policy on one "
        "thread of a shared machine. Right replies, with 95% intervals over questions:",
        "",
        "| seed | replies | base | policy | policy less base |",
        "|---|---|---|---|---|",
    ]
    for name, row in [*((str(run["seed"]), run) for run in runs), ("all", found["pooled"])]:
        for way in ("greedy", "sampled"):
            compared = row[way]
            lines.append(
                f"| {name} | {way} | {_interval(compared['base'])} | {_interval(compared['policy'])} "
                f"| {_points(compared['policy_less_base']['difference'])} |"
            )
    titles = [*_VOTES.values(), "samples that end: base", "policy", "right of these: base", "policy"]
    lines += ["", f"| seed | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for run in runs:
        shares = " | ".join(_interval(run["votes"][name]) for name in _VOTES)
        kept, judged = run["votes"]["states"]["kept"], sum(run["votes"]["states"].values())
        ended = [run[who]["finished"] for who in ("base", "policy")]
        right = [run["sampled"][who]["value"] / share for who, share in zip(("base", "policy"), ended, strict=True)]
        ends = " | ".join(f"{100 * share:.1f}%" for share in (*ended, *right))
        lines.append(f"| {run['seed']}: {kept} of {judged} pairs kept | {shares} | {ends} |")
    return "\n".join(lines) + "\n"


_VOTES = {
    "majority_right": "majority right",
    "clear_majority_right": "majority right, clear",
    "chosen_right": "preferred reply of a kept pair right",
    "rejected_right": "other reply right",
}


def sft_table() -> str:
    """Return the losses of supervised fine-tuning next to those of TRL."""
    found = _load("sft")
    columns = ("model", "batch", "tokens with a loss", "TRL", "packed", "one by one", "equal token ids and masks")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    titles = {"tiny": "random Llama", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
    # An instruct model is measured with --model only.
    names = {model: title for model, title in titles.items() if model in found}
    for model, title in names.items():
        for batch, row in found[model].items():
            losses = " | ".join(f"{row[name]:.6f}" for name in ("trl", "packed", "one_by_one"))
            equal = "yes" if row["equal_ids"] and row["equal_masks"] else "no"
            lines.append(f"| {title} | {batch} | {row['tokens']} | {losses} | {equal} |")
    largest = max(row["difference"] for model in names for row in found[model].values())
    peers = found["peers"]
    caption = (
        f"Mean loss in nats per token, by `{found['command']}` with TRL {peers['trl']} and transformers "
        f"{peers['transformers']}; the largest difference is {largest:.1g}. "
        "Without marks, TRL gets a copy of the template with `{% generation %}` marks."
    )
    return "\n".join([caption, "", *lines]) + "\n"


def vocabulary_table() -> str:
    """Return the figures of new tokens, from results/vocabulary.json."""
    if not _is_measured("vocabulary"):
        return "`python benchmarks/vocabulary.py` has no results yet.\n"
    found = _load("vocabulary")
    columns = (
        "text",
        "tuned",
        "steps",
        "characters per token",
        "loss, nats per character",
        "of the seeds",
        "minus no new tokens",
    )
    lines = [
        f"By `{found['command']}`: {found['tokens']} new tokens, steps of {found['batch']} rows of {found['length']} tokens, "
        f"learning rate {found['learning_rate']}; mean of {found['seeds']} seeds on the same held-out passages, with the 95% "
        "interval over passages (Student).",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for text, rows in found["texts"].items():
        first = f"{rows['before']['characters_per_token']:.2f} | {_spread(rows['before']['loss'])}"
        lines.append(f"| {text} | not at all | 0 | {first} | | |")
        for kind, title in _EXTENSIONS.items():
            row = rows[kind]
            seeds = f"{min(row['loss_of_seeds']):.3f} to {max(row['loss_of_seeds']):.3f}"
            change = "" if kind == "plain" else _spread(row["change"], sign="+")
            loss = f"{row['characters_per_token']:.2f} | {_spread(row['loss'])}"
            lines.append(f"| {text} | {title} | {row['steps']} | {loss} | {seeds} | {change} |")
    sizes = ", ".join(
        f"{text}: {rows['train_characters']:,} characters to train on, {rows['held_characters']:,} held out"
        for text, rows in found["texts"].items()
    )
    return "\n".join([*lines, "", f"{sizes}."]) + "\n"


_EXTENSIONS = {
    "plain": "without new tokens",
    "steps": "with new tokens, equal steps",
    "text": "with new tokens, equal text",
}


def _spread(figure: dict[str, Any], sign: str = "") -> str:
    return f"{figure['value']:{sign}.3f} ({figure['ci_low']:{sign}.3f} to {figure['ci_high']:{sign}.3f})"


def over_tables() -> str:
    """Return the tables of docs/algorithms/over-optimisation.md, from results/overoptimisation.json."""
    if not _is_measured("overoptimisation"):
        return "The trainings of `python benchmarks/overoptimisation.py` have no results yet.\n"
    found = _load("overoptimisation")
    members, best, ppo = found["members"], found["best_of_n"], found["ppo"]
    accuracies = ", ".join(f"{100 * one['value']:.1f}%" for one in members["accuracy_members"])
    apart = members["disagreement_error_correlation"]
    most = next(iter(best.values()))["points"][-1]
    lines = [
        f"By `{found['command']}`. Four evaluators trained on {members['pairs']} pairs each pick the better of two held-out "
        f"replies in {accuracies} of cases, their mean in {_interval(members['accuracy_mean'])} "
        f"(n = {members['accuracy_mean']['n']:,}). How far they are apart goes with being wrong at a rank correlation of "
        f"{apart['value']:.2f} ({apart['ci_low']:.2f} to {apart['ci_high']:.2f}). Best of n: {found['questions']} questions, "
        "the same for all. PPO: one seed.",
        "",
        f"| evaluator | best of {most['n']}: promised | gold | gap | gap removed | PPO: gap over the last 4 iterations "
        "| largest KL | gap removed | gold after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    single = _best_gap(best["one evaluator"])
    for name, row in ppo.items():
        point, gap = best[name]["points"][-1], _best_gap(best[name])
        removed = "" if name == "one evaluator" else f"{100 * (1 - gap / single):.0f}%"
        by_ppo = "none to remove" if row["gap_removed"] is None else f"{100 * row['gap_removed']:.0f}%"
        lines.append(
            f"| {name} | {100 * point['expected']:.1f}% | {_interval(_share(point['gold'], found['questions']))} "
            f"| {100 * gap:.1f} points | {removed} "
            f"| {100 * row['gap']:.1f} points | {row['largest_kl']:.1f} | {'' if name == 'one evaluator' else by_ppo} "
            f"| {_interval(row['gold_after'])} |"
        )
    words = "Share of right replies that the scores promise, and by gold, over the square root of the KL: best of n, and PPO"
    lines += ["", f"![{words}]({_OVER.with_suffix('.svg').name})"]
    lines += ["", "| fitted | best of n: alpha | beta | PPO: alpha | beta |", "|---|---|---|---|---|"]
    for name, row in ppo.items():
        for key, said in (("expected", "promised"), ("gold", "gold")):
            one, other = best[name]["fit"][key], row["fit"][key]
            lines.append(
                f"| {name}, {said} | {one['alpha']:.3f} | {one['beta']:.3f} | {other['alpha']:.3f} | {other['beta']:.3f} |"
            )
    return "\n".join(lines) + "\n"


_INPUTS = {
    "same": "same: four of the last layer, with the reference answer",
    "layers": "layers: two of the last layer, one of layer 3, one of layer 2",
    "reference": "reference: two with the reference answer, two without",
    "both": "both: the last layer and layer 3, each with and without the reference answer",
}
"""Descriptions of the ensembles of benchmarks/ensemble.py."""


def ensemble_tables() -> str:
    """Return the tables on members that read different inputs, from results/ensemble.json."""
    if not _is_measured("ensemble"):
        return "`python benchmarks/ensemble.py` has no results yet.\n"
    found = _load("ensemble")
    members, cause = found["members"], found["cause"]
    lines = [
        f"By `{found['command']}`: best of {found['best_of']}, {found['questions']} questions, the same replies for all rows; "
        f"what is fitted for a question is fitted on those of the other {found['folds'] - 1} folds; one training of each "
        f"member, on {members['pairs']} pairs. Gap closed and gold gained are paired by question with one evaluator. Right "
        f"replies are {_figure(found['right_replies'])} of all, and {_figure(found['with_right_reply'])} of the questions have "
        "one.",
        "",
        "| selected by | promised | gold | gap | gap closed | gold gained |",
        "|---|---|---|---|---|---|",
        *(_arm_line(name, row) for name, row in found["arms"].items()),
        "",
        f"The reply that one evaluator selects has the final answer of its reference answer in "
        f"{_figure(cause['selected_follow_reference'])} of the questions; the reference answer is right in "
        f"{_figure(cause['reference_right'])}. Of the {cause['wrong_follow_reference']['n']} wrong selections, "
        f"{_figure(cause['wrong_follow_reference'])} have its final answer.",
        "",
        "| members | right reply of a held-out pair | rank correlation of disagreement with errors: pairs | best of "
        f"{found['best_of']} | gold of the half with the least disagreement | of the half with the most votes |",
        "|---|---|---|---|---|---|",
        *(_alarm_line(name, found) for name in found["ensembles"]),
    ]
    return "\n".join(lines) + "\n"


def _arm_line(name: str, row: dict[str, Any]) -> str:
    is_baseline = name == "one evaluator"
    closed, more = row["gap_closed"], row["gold_more"]
    gained = ["", ""] if is_baseline else [_interval(closed), _points(more)]
    cells = [_interval(row["promised"]), _interval(row["gold"]), _points(row["gap"]), *gained]
    return f"| {name} | {' | '.join(cells)} |"


def _alarm_line(name: str, found: dict[str, Any]) -> str:
    pairs, alarms = found["members"]["held_out"][name], found["alarms"]
    apart, vote = alarms[f"disagreement, {name}"], alarms[f"1 - vote, {name}"]
    correlations = [_correlation(figure) for figure in (pairs["disagreement_error"], apart["error_correlation"])]
    halves = [_interval(signal["gold_of_surer_half"]) for signal in (apart, vote)]
    return f"| {_INPUTS[name]} | {_interval(pairs['accuracy'])} | {' | '.join([*correlations, *halves])} |"


def _correlation(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['ci_low']:.2f} to {figure['ci_high']:.2f})"


def _share(value: float, n: int) -> dict[str, Any]:
    """Format a share of n with its interval."""
    right = round(value * n)
    return proportion([True] * right + [False] * (n - right)).as_json()


def _best_gap(row: dict[str, Any]) -> float:
    """Return predicted minus actual accuracy at the largest n of best of n."""
    point = row["points"][-1]
    return float(point["expected"] - point["gold"])


def over_plot() -> str:
    """Plot predicted and actual accuracy over the square root of the KL, for one evaluator and for the mean of four."""
    found, panels = _load("overoptimisation"), []
    for name in ("one evaluator", "mean of four"):
        for kind, title in (("best_of_n", "best of n"), ("ppo", "PPO")):
            points = found[kind][name]["points"]
            lines = [
                Line(said, sorted((math.sqrt(max(point["kl"], 0.0)), point[key]) for point in points))
                for key, said in (("expected", "promised"), ("gold", "gold"))
            ]
            words = f"{name.capitalize()}, {title}: share right"
            drawn = line_chart(lines, label=words, x_label="square root of the KL", percent_axes="y", whole_x=False)
            panels.append((words, drawn))
    return _side_by_side(panels)


def _refresh(path: Path, blocks: str | tuple[str, ...], check: bool) -> None:
    """Put a block, or several in their order, into a page, and the same into its translation."""
    blocks = (blocks,) if isinstance(blocks, str) else blocks
    for page in with_translation(path):
        _write(page, _filled(page.read_text(encoding="utf-8"), [localized(block, path, page) for block in blocks]), check)


def _filled(text: str, blocks: list[str]) -> str:
    found = len(_BLOCK.findall(text))
    if found != len(blocks):
        sys.exit(f"a page has {found} places for figures (<!-- figures -->), and {len(blocks)} blocks to put there")
    given = iter(blocks)
    return _BLOCK.sub(lambda match: match.group(1) + next(given) + match.group(2), text)


def _write(path: Path, new: str, check: bool) -> None:
    if check and (not path.is_file() or new != path.read_text(encoding="utf-8")):
        sys.exit(f"the figures in {path.name} are not those of benchmarks/results; run python benchmarks/figures.py")
    if not check:
        path.write_text(new, encoding="utf-8")


def text_metrics_tables() -> str:
    """Return agreement with published values, times, and what perplexity finds, from results/text_metrics.json."""
    if not _is_measured("text_metrics"):
        return "`python benchmarks/text_metrics.py` has no results yet.\n"
    found = _load("text_metrics")
    lines = [
        f"By `{found['command']}`, on one core of a shared machine. Published values that have the same definition:",
        "",
        "| values | cases | equal to the published digits | largest difference |",
        "|---|---|---|---|",
        *(f"| {row['values']} | {row['n']} | {row['equal']} | {row['largest']:.1g} |" for row in found["agreement"]),
        "",
        f"CPU seconds per {found['lines']:,} lines of {found['words_per_line']:.0f} words with one reference, and intervals:",
        "",
        "| metric | seconds |",
        "|---|---|",
        *(f"| `{name}` | {seconds:.2f} |" for name, seconds in found["seconds"].items()),
        "",
        *_ngram_lines(found),
    ]
    return "\n".join(lines) + "\n"


def _ngram_lines(found: dict[str, Any]) -> list[str]:
    ngram = found["ngram"]
    shares = [f"{_interval(row['precision'])}" for row in found["anomalies"]]
    areas = [
        f"{row['auc']['value']:.4f} ({row['auc']['ci_low']:.4f} to {row['auc']['ci_high']:.4f})" for row in found["anomalies"]
    ]
    return [
        "The n-gram model, trained on sentences of the same kind:",
        "",
        "| texts | seconds to train | seconds to score 1,000 |",
        "|---|---|---|",
        *(f"| {row['texts']:,} | {row['train']:.2f} | {row['score_1000']:.2f} |" for row in ngram["rows"]),
        "",
        f"`nltk.lm.KneserNeyInterpolated`, trained on {ngram['nltk_texts']:,} texts, takes "
        f"{ngram['nltk_score_1000']:.0f} seconds to score 1,000, and its time per text grows with their number.",
        "",
        f"Among {found['texts'] - found['planted']} word problems, {found['planted']} instructions on other subjects were "
        f"planted. Of the {found['planted']} highest perplexities, {'; '.join(shares)} were planted ones (three draws); the "
        f"area under the ROC curve is {'; '.join(areas)}.",
    ]


def serve_tables() -> str:
    """Return throughput and latency of `selfeval serve`, and the outcomes of mixed requests, from results/serve.json."""
    if not _is_measured("serve"):
        return "`python benchmarks/serve.py` has no results yet.\n"
    found = _load("serve")
    servers = (("`selfeval serve`", found["ours"]), ("`transformers serve`", found["transformers_serve"] or []))
    lines = ["| server | clients | requests/s | tokens/s | p50 | p95 |", "|---|---|---|---|---|---|"]
    for name, loads in servers:
        for load in loads:
            rates = f"{load['requests_per_second']:.2f} | {load['tokens_per_second']:.0f}"
            lines.append(
                f"| {name} | {load['clients']} | {rates} | {load['p50_seconds']:.2f} s | {load['p95_seconds']:.2f} s |"
            )
    machine, requests = found["machine"], found["ours"][0]["requests"]
    lines += [
        "",
        f"By `{found['command']}`: {requests} greedy chat requests of up to {found['max_tokens']} tokens to the policy of the "
        f"embedded model for each row, on {machine['cores']} cores of a shared machine, so times vary. One client calls "
        f"sequentially. `transformers serve` {machine['transformers']} has the merged export of the same policy in fp32, with "
        "its default settings.",
        "",
        *_mixed_lines(found["mixed"]),
    ]
    return "\n".join(lines) + "\n"


def _mixed_lines(mixed: dict[str, Any]) -> list[str]:
    outcomes, memory = mixed["outcomes"], mixed["rss_mib"]
    right, left = outcomes.get("right", 0), outcomes.get("client left", 0)
    parts = [memory[i * len(memory) // 4 : (i + 1) * len(memory) // 4] for i in range(4)]
    medians = ", ".join(f"{statistics.median(part):.0f}" for part in parts)
    return [
        f"Then {mixed['requests']:,} mixed requests of {mixed['clients']} clients in {mixed['seconds'] / 60:.0f} minutes: "
        f"chats, streams, completions, scores and rankings. {left:,} clients left before their reply. {right:,} received the "
        "reply that a single client had received for the same request, and "
        f"{mixed['requests'] - right - left:,} another one or an error. {mixed['left_over']} replies were left over. "
        f"Resident memory of the server, median of each quarter: {medians} MiB."
    ]


def scale_tables() -> str:
    """Return times with several workers, and the recovery from kills, from results/scale.json."""
    if not _is_measured("scale"):
        return "`python benchmarks/scale.py` has no results yet.\n"
    found = _load("scale")
    return "\n".join([*_worker_lines(found), *_kill_lines(found)]) + "\n"


def _worker_lines(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    if not runs:
        return []
    rows = [
        f"| {name if int(name) else 'none (one process)'} | {run['mapped']:.0f} s | {run['starting']:.0f} s | "
        f"{sum(run['cpu'].values()):.0f} s | {run['cpu']['ray']:.0f} s | {'yes' if run['same_shards'] else 'no'} |"
        for name, run in runs.items()
    ]
    return [
        "| workers | replies and verdicts | until the first worker is ready | CPU time of all processes | "
        "of it, Ray's own | same shards |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"By `{found['command']}`: runs of the embedded model up to the verdicts, {found['questions']} questions, one CPU "
        f"thread per process, on {found['machine']['cores']} hyper-threads of a shared machine, so wall times vary. CPU times "
        "include the stage questions and all imports.",
        "",
    ]


def _kill_lines(found: dict[str, Any]) -> list[str]:
    kills, compared = found.get("kills", []), found.get("compared", [])
    if not kills:
        return []
    rows = []
    for target in dict.fromkeys(kill["target"] for kill in kills):
        seconds = sorted(kill["seconds"] for kill in kills if kill["target"] == target)
        spread = f"{statistics.median(seconds):.0f} s | {seconds[-1]:.0f} s"
        rows.append(f"| {target} | {len(seconds)} | {spread} |")
    stages = Counter(kill["stage"] or "between stages" for kill in kills)
    ends = "No run has reached its end yet, so no report was compared."
    same = sum(run["same_shards"] and run["same_roles"] and not run["report_differs_in"] for run in compared)
    if compared:
        ends = (
            f"At their end, {same} of {len(compared)} runs had the shards, the trained weights and the report of a run without "
            "kills, byte for byte apart from times and peak memory."
        )
    return [
        "| killed | times | recovery, median | longest |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{len(kills)} kills at random moments of small runs of all stages on two workers "
        f"({', '.join(f'{stage} {count}' for stage, count in stages.most_common())}). Recovery is the time until the run got "
        f"further than ever before; it includes the start of the command or of a worker. {sum(k['stuck'] for k in kills)} runs "
        f"got stuck. {ends}",
    ]


_PRINTED = re.compile(
    r"(?P<start><!-- figures: (?P<command>.+?)(?:, (?P<part>first|last) (?P<count>\d+)|, (?P<error>error))? -->\n)"
    r".*?(?P<end><!-- /figures -->)",
    re.DOTALL,
)


def storage_table() -> str:
    """Return the requests of a run at S3, from results/storage.json."""
    if not _is_measured("storage"):
        return "`python benchmarks/storage.py` has no results yet.\n"
    found = _load("storage")
    folder, remote = found["times"]["folder"], found["times"]["s3"]
    readings = {"a first reading command, elsewhere": found["readings"]["first"], "the same again": found["readings"]["again"]}
    return "\n".join(
        [
            f"By `{found['command']}`: a small run of {found['files']} files and {found['bytes'] / 2**20:.1f} MiB at an "
            f"emulator of S3, in {remote['seconds']:.0f} seconds, of which {remote['cpu_seconds']:.0f} seconds are CPU time of "
            f"its process; in a folder {folder['seconds']:.0f} and {folder['cpu_seconds']:.0f} seconds, on a shared machine. "
            "The longer a stage takes, the more often the index and the lease are written.",
            "",
            "| during | PUT | GET | LIST | DELETE | MiB sent | MiB received |",
            "|---|---|---|---|---|---|---|",
            *(_storage_line(name, row) for name, row in (found["stages"] | readings).items()),
            "",
        ]
    )


def _storage_line(name: str, row: dict[str, int]) -> str:
    requests = " | ".join(f"{row.get(method, 0):,}" for method in ("PUT", "GET", "LIST", "DELETE"))
    sizes = " | ".join(f"{row[key] / 2**20:.2f}" for key in ("sent_bytes", "received_bytes"))
    return f"| {name} | {requests} | {sizes} |"


def _refresh_tutorial(name: str, check: bool) -> None:
    """Put what the commands of a tutorial printed into its page and the translation of the page."""
    measured = _is_measured(f"tutorial_{name}")
    found = _load(f"tutorial_{name}") if measured else {"command": f"python benchmarks/tutorials.py {name}", "printed": []}
    for page in with_translation(_ROOT / "docs" / "tutorials" / f"{name}.md"):
        text = page.read_text(encoding="utf-8")
        _write(page, _PRINTED.sub(lambda match: match["start"] + _printed(found, match) + match["end"], text), check)


def _printed(found: dict[str, Any], match: re.Match[str]) -> str:
    """Return the output of one command, as a block of text; `measured` is the sentence that names the benchmark."""
    printed = next((one for one in found["printed"] if one["command"] == match["command"]), None)
    if match["command"] == "measured" and found["printed"]:
        minutes = sum(one["seconds"] for one in found["printed"]) / 60
        return f"By `{found['command']}`: {found['model']}, {minutes:.0f} minutes on one thread of a shared machine.\n"
    if printed is None:
        return f"`{found['command']}` has no results yet.\n"
    lines = [printed["error"]] if match["error"] else printed["out"]
    if match["count"]:
        count = int(match["count"])
        lines = lines[:count] if match["part"] == "first" else lines[-count:]
    return "\n".join(["```text", *(line.rstrip() for line in _in_columns(lines)), "```", ""])


def _in_columns(lines: list[str]) -> list[str]:
    """Return lines whose fields a tab separates with the second field in one column."""
    width = max((len(line.partition("\t")[0]) for line in lines if "\t" in line), default=0)
    return [f"{name:{width}}  {value}" if tab else name for name, tab, value in (line.partition("\t") for line in lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a page is not up to date")
    options = parser.parse_args()
    _refresh(_README, table(), options.check)
    _refresh(_CARD, skills_table(), options.check)
    _refresh(_LONG, long_context_table(), options.check)
    _write(_PLOT, long_context_plot(), options.check)
    _refresh(_COST, cost_tables(), options.check)
    _refresh(_CONTROL, control_table(), options.check)
    _refresh(_STABILITY, stability_tables(), options.check)
    _refresh(_LEARNERS, learners_table(), options.check)
    _refresh(_LOOP, rounds_table(), options.check)
    _refresh(_SPARSE, sparse_table(), options.check)
    _refresh(_OVER, over_tables() + "\n### Members that read different inputs\n\n" + ensemble_tables(), options.check)
    _refresh(_EVIDENCE, coverage_tables(), options.check)
    _refresh(_QUESTIONS, (filters_table(), questions_table()), options.check)
    _refresh(_EMBEDDINGS, embedders_tables(), options.check)
    _refresh(_FINE_TUNING, (sft_table(), vocabulary_table()), options.check)
    _refresh(_CHECK, check_table(), options.check)
    _refresh(_SEARCH, (index_table(), duplicates_table()), options.check)
    _refresh(_SERVE, serve_tables(), options.check)
    _refresh(_SCALE, scale_tables(), options.check)
    _refresh(_STORAGE, storage_table(), options.check)
    _refresh(_JUDGING, word_problems_table(), options.check)
    _refresh(_WHICH_JUDGE, judges_by_domain_table(), options.check)
    _refresh(_HUMAN, human_labels_table(), options.check)
    _refresh(_STEPS, steps_tables(), options.check)
    _refresh(_EVALUATOR, options_table() + attacks_table(), options.check)
    _refresh(_ROLES, decoding_table(), options.check)
    _refresh(_TEXT_METRICS, text_metrics_tables(), options.check)
    shared = "\n".join(block for block in (step_table(), side_tables()) if block)
    _refresh(_SPEED, (shared, speculation_tables(), growth_table()), options.check)
    _refresh(_MEMORY, freed_memory_table(), options.check)
    scale = _load("scale_model")
    _refresh(_SCALE_MODEL, (predicted_tables(scale), limits_tables(scale), check_tables(scale)), options.check)
    _write(_SCALE_MODEL.with_suffix(".svg"), _side_by_side(efficiency_plot(scale)), options.check)
    _refresh_tutorial("mathematics", options.check)
    if _is_measured("overoptimisation"):
        _write(_OVER.with_suffix(".svg"), over_plot(), options.check)


if __name__ == "__main__":
    main()
