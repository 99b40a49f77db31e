"""The stages of a run, connected by files, and how they are run in order."""

from __future__ import annotations

__all__ = ["STAGE_NAMES"]

STAGE_NAMES = ("questions", "replies", "verdicts", "pairs", "evaluator", "steps", "policy", "evaluation", "report")
"""The stages in order; `steps` runs only with `steps.enabled`.

Defined here so that the command line can list them without importing them."""
