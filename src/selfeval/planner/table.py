"""Print a memory plan as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from selfeval.planner.memory_plan import KINDS, PHASES, DevicePlan, Plan
from selfeval.texts import format_bytes

__all__ = ["print_plan"]

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
