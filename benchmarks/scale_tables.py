"""The tables and the plot of docs/concepts/scale.md, from results/scale_model.json. Used by figures.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from selfeval.report.charts import Line, line_chart

SIZES = (1, 8, 64, 512)
_PARTS = ("start", "questions", "replies", "verdicts", "evaluator", "policy", "evaluation")
_LOADS = {"default": "default settings", "large": "large run"}


def predicted_tables(found: dict[str, Any]) -> str:
    """Return time and cost of the runs, and the parts of the large one."""
    prices = found["prices"]
    lines = [
        f"By `{found['command']}`. Time and cost of a run, at {prices['H100']:.2f} per hour of an H100 and "
        f"{prices['A100']:.2f} of an A100, in any currency; efficiency against the smallest number of GPUs that runs.",
        "",
    ]
    for load, title in _LOADS.items():
        lines += [f"| {title} | GPU | {_heads('{:,} GPU')} |", "|---|---|" + "---|" * len(SIZES)]
        rows = [row for row in found["predicted"] if row["load"] == load]
        kinds = dict.fromkeys((row["setup"], row["gpu"]) for row in rows)
        for setup, gpu in kinds:
            own = {row["gpus"]: row for row in rows if (row["setup"], row["gpu"]) == (setup, gpu)}
            lines.append(f"| {setup} | {gpu} | {' | '.join(_cell(own.get(size)) for size in SIZES)} |")
        lines.append("")
    return "\n".join([*lines, *_part_lines(found)]) + "\n"


def _heads(form: str) -> str:
    return " | ".join(form.format(size) for size in SIZES)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "too few"
    return f"{_time(row['seconds'])}, {_money(row['cost'])}, {100 * row['efficiency']:.0f}%"


def _money(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _time(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _part_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for setup in dict.fromkeys(row["setup"] for row in found["predicted"]):
        if "4 GPUs" in setup:
            continue
        own = {
            row["gpus"]: row["parts"]
            for row in found["predicted"]
            if (row["load"], row["gpu"], row["setup"]) == ("large", "H100", setup)
        }
        lines += [f"| large run, {setup.split(',')[0]}, H100: part | {_heads('{:,} GPU')} |", "|---|" + "---|" * len(SIZES)]
        lines += [f"| {name} | {' | '.join(_time(own[size][name]) for size in SIZES)} |" for name in _PARTS if own[1][name]]
        lines.append("")
    return lines


def limits_tables(found: dict[str, Any]) -> str:
    """Return where each part saturates, and the effect of other assumptions and of changes."""
    lines = [
        "Number of GPUs (a power of two, H100) from which more than half of the GPU time of a part is wasted, against the "
        "smallest number that runs.",
        "",
        f"| | {' | '.join(_PARTS)} | whole run |",
        "|---|" + "---|" * (len(_PARTS) + 1),
    ]
    for row in found["saturation"]:
        cells = [_from(row["parts"].get(name, 0)) for name in _PARTS]
        lines.append(f"| {_LOADS[row['load']]}, {row['setup']} | {' | '.join(cells)} | {_from(row['run'])} |")
    lines += ["", "| large run, 7B, H100 | 64 GPU | 512 GPU | against the first row, 512 GPU |", "|---|---|---|---|"]
    first = found["variations"][0]
    for row in found["variations"]:
        ratio = row["512"] / first["512"] - 1
        lines.append(f"| {row['change']} | {_time(row['64'])} | {_time(row['512'])} | {100 * ratio:+.0f}% |")
    return "\n".join(lines) + "\n"


def _from(size: int | None) -> str:
    return "none up to 1,024" if size is None else f"{size:,}" if size else ""


def check_tables(found: dict[str, Any]) -> str:
    """Return the comparisons of the formula with the simulation and with measured runs, and the intervals of checkpoints."""
    return "\n".join([*_interval_lines(found), *_simulation_lines(found), *_run_lines(found), *_measured_lines(found)]) + "\n"


def _interval_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "Iterations between checkpoints of the policy, large run on H100; overhead of checkpoints and losses. The best "
        "interval is the best of all whole numbers of iterations; after the last iteration there is no checkpoint.",
        "",
        "| | GPU | losses | hours between losses | iteration | checkpoint | Young | Daly | best | overhead | "
        "overhead with the default, 5 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["intervals"]:
        times = "as published" if row["times"] == 1 else f"{row['times']:.0f} times"
        lines.append(
            f"| {row['setup'].split(',')[0]} | {row['workers']} | {times} | {row['hours_between_losses']:,.1f} | "
            f"{row['iteration']:.0f} s | {row['checkpoint']:.1f} s | {row['young']:.1f} | {row['daly']:.1f} | {row['best']} | "
            f"{100 * row['overhead_at_best']:.2f}% | {100 * row['overhead']:.2f}% |"
        )
    return [*lines, ""]


def _simulation_lines(found: dict[str, Any]) -> list[str]:
    heads = " | ".join(f"{kind}, W = {size}" for kind in ("shards", "training") for size in SIZES)
    lines = [
        "Formula over simulation, less one, with the half width of the simulation's 95% interval: three shards of 60 s per "
        "worker (8 for one), and 24 iterations of four phases of 5.1 s.",
        "",
        f"| | {heads} |",
        "|---|" + "---|" * (2 * len(SIZES)),
    ]
    for chance in dict.fromkeys(row["chance"] for row in found["checks"]):
        own = {(row["part"], row["workers"]): row for row in found["checks"] if row["chance"] == chance}
        cells = [_gap(own[part, size]) for part in ("map", "training") for size in SIZES]
        lines.append(f"| {chance} | {' | '.join(cells)} |")
    return [*lines, ""]


def _gap(row: dict[str, Any]) -> str:
    figure = row["simulation"]
    if figure["ci_low"] is None:
        return f"{100 * row['difference']:+.1f}%"
    return f"{100 * row['difference']:+.1f}% ± {100 * (figure['ci_high'] - figure['value']) / figure['value']:.1f}"


def _run_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "| whole run of the default settings, 7B, H100 | workers | formula | simulation | longest of the simulations | "
        "formula over simulation |",
        "|---|---|---|---|---|---|",
    ]
    names = {"usual": "as assumed", "many": "spread 0.3, losses 1,000 times as often"}
    for row in found["run_checks"]:
        lines.append(
            f"| {names[row['chance']]} | {row['workers']} | {row['formula']:,.0f} s | {row['simulation']['value']:,.0f} s | "
            f"{row['most']:,.0f} s | {_gap(row)} |"
        )
    return [*lines, ""]


def _measured_lines(found: dict[str, Any]) -> list[str]:
    measured = found["measured"]
    lines = [
        "Runs of the embedded model on this machine, CPU seconds of the busiest process. The formula has the costs per token "
        f"and per pass that were measured apart: a decoding step {1e3 * measured['step']:.1f} ms and "
        f"{1e3 * measured['row']:.2f} ms per row, {1e3 * measured['read']:.2f} ms per token read, "
        f"{1e3 * measured['learn']:.2f} ms per token learned from.",
        "",
        "| stage | units | measured, 1 worker | formula | measured, 2 workers | formula | formula, calibrated on 1 worker | "
        "difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["compared"]:
        unit = {"evaluator": "steps", "policy": "iterations"}.get(row["stage"], "shards")
        lines.append(
            f"| {row['stage']} | {row['units']['1']} {unit} | {row['measured']['1']:.1f} | {row['formula']['1']:.1f} | "
            f"{row['measured']['2']:.1f} | {row['formula']['2']:.1f} | {row['calibrated']:.1f} | "
            f"{100 * row['difference']:+.0f}% |"
        )
    sizes = measured["runs"]["1"]["bytes"]
    lines += [
        "",
        f"Messages of these runs: a gathered reply has {measured['bytes_per_token']:.1f} bytes per token; the results of a "
        f"shard of replies {sizes['shard of replies']:,} bytes, of verdicts {sizes['shard of verdicts']:,}; the gradients of a "
        f"role {4 * measured['adapter']:,}. The process of the command spends {1e3 * measured['driver']:.0f} ms of CPU time "
        "per shard.",
    ]
    return lines


def efficiency_plot(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return titled charts of the efficiency over the number of GPUs."""
    panels = []
    for load, title in _LOADS.items():
        rows = [row for row in found["saturation"] if row["load"] == load]
        lines = [Line(_short(row["setup"]), _points(row["efficiency"])) for row in rows]
        words = f"Efficiency, {title}"
        drawn = line_chart(lines, label=words, x_label="doublings of the GPUs", percent_axes="y", y_range=(0.0, 1.0))
        panels.append((words, drawn))
    return panels


def _short(setup: str) -> str:
    return setup.removesuffix(" per worker")


def _points(efficiency: dict[str, float]) -> Sequence[tuple[float, float]]:
    return [(math.log2(int(size)), value) for size, value in efficiency.items()]
