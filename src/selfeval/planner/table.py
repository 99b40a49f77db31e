"""Print a memory plan as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from selfeval.planner.memory_plan import KINDS, PHASES, DevicePlan, Plan
from selfeval.planner.stage_times import RunTime
from selfeval.texts import format_bytes

__all__ = ["print_plan", "print_times"]

_LABELS = {"kv_cache": "KV cache", "logits": "logits chunk", "allocator": "retained by malloc"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the device map, GiB per device, phase and kind, the settings, and any changes made or needed."""
    console = console or Console()
    _say(console, f"{plan.model}, {plan.parameters / 1e9:.3g}B parameters, {plan.precision} on {plan.main.device}")
    if not plan.placement.is_whole:
        _say(console, plan.placement.sentence())
        console.print(_by_device(plan))
    for device in plan.devices:
        if device.device != "disk":
            console.print(_by_kind(device))
    shown = plan.settings
    _say(
        console,
        f"micro-batches of {shown['micro_batch_rows']} rows (batch_tokens {shown['batch_tokens']}), "
        f"{shown['rollout_batch_size']} concurrent replies, layers {'recomputed' if shown['checkpointing'] else 'kept'}.",
    )
    console.print("It fits." if plan.fits else "It does not fit.", style="bold")
    for sentence in plan.changes:
        _say(console, f"- {sentence}")


def print_times(times: RunTime, console: Console | None = None) -> None:
    """Print the estimated minutes of each stage, and what the probe measured."""
    console = console or Console()
    table = Table(title="Time on this machine", title_justify="left")
    for name in ("stage", "tokens written", "tokens read", "tokens learned", "minutes"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in times.stages:
        tokens = (f"{count:,.0f}" for count in (stage.tokens.written, stage.tokens.read, stage.tokens.learned))
        table.add_row(stage.stage, *tokens, f"{stage.seconds / 60:.1f}")
    table.add_section()
    table.add_row("total", "", "", "", f"{times.seconds / 60:.1f}", style="bold")
    console.print(table)
    probe = times.probe
    _say(
        console,
        f"Measured: {probe.write * 1e3:.3g} ms a token written, {probe.read * 1e3:.3g} read, {probe.learn * 1e3:.3g} learned; "
        f"replies of {probe.lengths.reply:.0f} tokens. All verdicts count as kept, and no question as sampled in vain.",
    )
    if probe.unfinished >= 0.005:
        _say(
            console,
            f"{probe.unfinished:.0%} of the replies of the probe were cut off, and count with the limit of the run, so the "
            "estimate may be too high.",
        )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _by_device(plan: Plan) -> Table:
    """Build a table of the totals of each phase, one row per device."""
    table = Table(title="Memory by device", title_justify="left")
    for name in ("device", "layers"):
        table.add_column(name)
    for name in ("available", *PHASES):
        table.add_column(name, justify="right")
    for device in plan.devices:
        budget = "-" if device.budget is None else _cell(device.budget)
        totals = (_cell(device.total(phase)) for phase in PHASES)
        table.add_row(device.device, ", ".join(device.layers) or "-", budget, *totals)
    return table


def _by_kind(device: DevicePlan) -> Table:
    """Build a table of one device's memory, one row per kind that occurs."""
    limit = "no limit known" if device.budget is None else f"{_cell(device.budget)} available"
    table = Table(title=f"Memory on {device.device}, {limit}", title_justify="left")
    table.add_column("")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for kind in KINDS:
        sizes = [device.phases[phase].get(kind, 0) for phase in PHASES]
        # Memory of the process is shown only where there is some, that of the model always.
        if any(sizes) or kind not in ("runtime", "kernels", "allocator"):
            table.add_row(_LABELS.get(kind, kind), *(_cell(size) for size in sizes))
    table.add_section()
    table.add_row("total", *(_cell(device.total(phase)) for phase in PHASES), style="bold")
    return table


def _cell(size: int) -> str:
    return format_bytes(size, digits=4) if size else "-"
