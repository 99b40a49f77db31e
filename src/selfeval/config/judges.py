"""The judges: the registry of the facts that the rest of the package needs about each before it is imported.

A new judge is one file in `judging/judges/`, one row of `JUDGES` here, its test, and its section in the docs; CONTRIBUTING.md
lists all places. The implementations are given as strings and imported on demand, because this package must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfeval.config.fields import Section

__all__ = ["JUDGES", "REFEREE", "JudgeConfig", "JudgeRole", "JudgeSpec", "TemplateKind", "judge_spec"]

JudgeRole = Literal["judge", "referee"]
"""judge: labels the training pairs. referee: compares the policy with its start, with prompts that labelled nothing."""


class JudgeConfig(Section):
    """Base class of the judges' sections."""


@dataclass(frozen=True)
class TemplateKind:
    """A kind of prompt template: the file `NAME.jinja` of a templates folder.

    Attributes:
        name: name of the kind.
        sample: variables of the template, with a sample value of each that is used to check it.
        settings: keys of templates.toml that its prompts depend on, in addition to its labels.
        labels: names of the verdict labels in its table `[NAME]` of templates.toml, at least two; empty if it has no table.
        flags: further variables, true or false, that the template need not read.
    """

    name: str
    sample: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgeSpec:
    """Facts that the rest of the package needs about a judge before it is imported.

    Attributes:
        name: value of `verdicts.judge`, and name of the judge's section, `[verdicts.NAME]`.
        implementation: `module:object` in `judging/judges/`; the object takes a `JudgeContext` and returns a `Judge`.
        summary: one line for the documentation.
        templates: kinds of templates that it reads in each role. A role without an entry needs no template.
        config: class of its section; None if it has no settings besides those of `[verdicts]`.
        replies_per_prompt: number of replies that a prompt of the role `judge` shows; the planner counts them. Default: 2.
    """

    name: str
    implementation: str
    summary: str
    templates: Mapping[JudgeRole, tuple[TemplateKind, ...]] = field(default_factory=dict)
    config: type[JudgeConfig] | None = None
    replies_per_prompt: int = 2

    def kinds(self, role: JudgeRole) -> tuple[str, ...]:
        """Return the names of the kinds of templates that it reads in a role."""
        return tuple(kind.name for kind in self.templates.get(role, ()))


_PAIR = {"question": "How many apples does Mary have?", "first": "She has five.", "second": "Mary has six."}
_BETTER = ("first", "second", "tie")
_CUT = ("first_cut", "second_cut")


def _registry(*specs: JudgeSpec) -> dict[str, JudgeSpec]:
    return {spec.name: spec for spec in specs}


JUDGES: dict[str, JudgeSpec] = _registry(
    JudgeSpec(
        "pairwise",
        "pairwise:PairwiseJudge",
        "The base model, prompted to compare two replies in both orders.",
        templates={
            # Two kinds with the same variables: the referee needs prompts that labelled no training pair.
            "judge": (TemplateKind("judge", _PAIR, labels=_BETTER, flags=_CUT),),
            "referee": (TemplateKind("referee", _PAIR, labels=_BETTER, flags=_CUT),),
        },
    ),
)
"""The judges by name. Registering a judge here is enough to configure and use it, and to check its templates."""

REFEREE = "pairwise"
"""The judge in the role of referee. It is the same for every `verdicts.judge`, so evaluations are comparable."""


def judge_spec(role: JudgeRole, name: str) -> JudgeSpec:
    """Return the registry entry of the judge in a role.

    Args:
        role: role of the judge.
        name: value of `verdicts.judge`; the referee does not depend on it.
    """
    return JUDGES[REFEREE if role == "referee" else name]
