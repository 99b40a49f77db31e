"""A memory plan as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from selfeval.backbone.plan import KINDS, PHASES, Plan

__all__ = ["print_plan"]

_LABELS = {"kv_cache": "KV cache", "logits": "logits chunk"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints GiB per phase and kind, the chosen settings, and what was or has to be changed."""
    console = console or Console()
    limit = "no limit known" if plan.budget is None else f"{plan.budget / 2**30:.2f} GiB to take"
    table = Table(
        title=f"{plan.model}, {plan.parameters / 1e9:.3g}B, {plan.precision} on {plan.device}; {limit}", title_justify="left"
    )
    table.add_column("GiB")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for kind in KINDS:
        table.add_row(_LABELS.get(kind, kind), *(_cell(plan.phases[phase].get(kind, 0)) for phase in PHASES))
    table.add_section()
    table.add_row("total", *(_cell(plan.total(phase)) for phase in PHASES), style="bold")
    console.print(table)
    shown = plan.settings
    console.print(
        f"micro-batches of {shown['micro_batch_rows']} rows (batch_tokens {shown['batch_tokens']}), "
        f"{shown['rollout_rows']} replies side by side, layers {'recomputed' if shown['checkpointing'] else 'kept'}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print("It fits." if plan.fits else "It does not fit.", style="bold")
    for sentence in plan.changes:
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)


def _cell(size: int) -> str:
    return f"{size / 2**30:.3f}" if size else "-"
