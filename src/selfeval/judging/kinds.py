"""The kinds of prompt templates: those that stages read, and those that judges request; and which of them a run needs."""

from __future__ import annotations

from selfeval.config import JUDGES, REPLY, TemplateKind, VerdictsConfig

__all__ = ["PASSAGE_KINDS", "STAGE_KINDS", "kinds_of_run", "template_kinds"]

_QUESTION = {"question": "How many apples does Mary have?"}

STAGE_KINDS = (
    TemplateKind("ask", {"examples": ["How many apples does Mary have?", "How many pears does Tom have?"]}, ("ask_stop",)),
    TemplateKind("grade", {**_QUESTION, "reference_answer": "Mary has 3."}, ("grade_reference_answer",)),
    REPLY,
)
"""ask: write a question. reply: answer one. grade: prompt of evaluator and critic."""

_PASSAGE = {"passage": "Parcels are kept for three days."}

PASSAGE_KINDS = (
    TemplateKind("passage_question", _PASSAGE, ("ask_stop",), flags=("chinese",)),
    TemplateKind("passage_answer", {**_PASSAGE, **_QUESTION}, flags=("chinese",)),
)
"""Prompts of `selfeval seeds`: write a question about a passage, and answer it from the passage. No stage reads them."""


def template_kinds() -> dict[str, TemplateKind]:
    """Return all kinds of templates by name: those of the stages, of `selfeval seeds` and of every registered judge."""
    judges = (kind for spec in JUDGES.values() for kinds in spec.templates.values() for kind in kinds)
    return {kind.name: kind for kind in (*STAGE_KINDS, *PASSAGE_KINDS, *judges)}


def kinds_of_run(config: VerdictsConfig | None = None) -> tuple[str, ...]:
    """Return the kinds of templates that a run reads; its templates folder needs no others.

    Args:
        config: Optional. Settings of the verdicts, which name the judge. Default: the default settings.
    """
    settings = config or VerdictsConfig()
    judges = (*settings.kinds("judge"), *settings.kinds("referee"))
    return tuple(dict.fromkeys((*(kind.name for kind in STAGE_KINDS), *judges)))
