"""The judges: the registry of the facts that the rest of the package needs about each before it is imported.

A new judge is one file in `judging/judges/`, one row of `JUDGES` here, its test, and its section in the docs; CONTRIBUTING.md
lists all places. The implementations are given as strings and imported on demand, because this package must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import Field, field_validator, model_validator

from selfeval.config.choices import check_name
from selfeval.config.fields import Nucleus, Positive, PositiveOrNone, Section, Share
from selfeval.config.servers import ServerConfig

__all__ = [
    "JUDGES",
    "REFEREE",
    "REPLY",
    "RUBRIC",
    "AgreementConfig",
    "CalibrationConfig",
    "CombinedConfig",
    "EndpointConfig",
    "JudgeConfig",
    "JudgeRole",
    "JudgeSpec",
    "PointwiseConfig",
    "TemplateKind",
    "judge_spec",
]

JudgeRole = Literal["judge", "referee"]
"""judge: labels the training pairs. referee: compares the policy with its start, with prompts that labelled nothing."""


class JudgeConfig(Section):
    """Base class of the judges' sections."""


_LONGEST_PATTERN = 500
SIGNAL_COUNT = 5
"""Number of signals of a verdict (`quality/judge_signals.py`)."""


class AgreementConfig(JudgeConfig):
    """Settings of `judge = "agreement"`."""

    answer: Literal["number", "boxed", "letter", "pattern"] = "number"
    r"""Form of a final answer: a number, the text in `\boxed{}`, the letter of a multiple choice, or the group of `pattern`."""
    pattern: str = ""
    """Regular expression with one group, the answer; the last match counts. Only with `answer = "pattern"`, which needs it."""
    votes: Annotated[int, Field(ge=2, le=1024, strict=True)] = 16
    """Replies that the judge samples per question; they are the vote."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Minimum share of the most frequent answer among all votes; below it, or if another answer has as many, it is unsure."""
    temperature: Positive = 0.7
    """Sampling temperature of the votes. Their token limit is `verdicts.max_new_tokens`."""
    top_p: Nucleus = 1.0
    """Nucleus (top-p) of the votes."""

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, value: str) -> str:
        if not value:
            return value
        if len(value) > _LONGEST_PATTERN:
            raise ValueError(f"has {len(value):,} characters; at most {_LONGEST_PATTERN} are allowed")
        try:
            groups = regex.compile(value).groups
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"has {groups} groups; write one, around the answer, and (?:...) for the others")
        return value

    @model_validator(mode="after")
    def _pattern_is_used(self) -> AgreementConfig:
        if (self.answer == "pattern") != bool(self.pattern):
            remedy = "set it" if not self.pattern else 'remove it, or set answer = "pattern"'
            raise ValueError(f'answer is "{self.answer}" and pattern is "{self.pattern}"; {remedy}')
        return self


class EndpointConfig(ServerConfig, JudgeConfig):
    """Settings of a server with the OpenAI chat-completions protocol, of `judge = "endpoint"` or of `[evaluation.referee]`."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({
        *("key_variable", "in_flight", "requests_per_minute", "timeout", "retries"),
        *("price_read", "price_written", "budget", "budget_tokens"),
    })  # fmt: skip
    """Settings on which no answer depends; a change of them reruns nothing."""

    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Parameter of a request that holds `verdicts.max_new_tokens`; newer models of OpenAI take `max_completion_tokens`."""
    probabilities: Literal["auto", "logprobs", "votes"] = "auto"
    """Source of the label probabilities: log-probs, sampled votes, or (`auto`) votes where the server returns no log-probs."""
    top_logprobs: Annotated[int, Field(ge=2, le=20, strict=True)] = 20
    """Number of alternatives per token that are requested with the log-probs."""
    votes: Annotated[int, Field(ge=1, le=64, strict=True)] = 8
    """Answers that are sampled per prompt where the probabilities come from votes."""
    temperature: Positive = 1.0
    """Sampling temperature of the votes. Log-probs are read from an answer at temperature 0."""
    price_written: PositiveOrNone = None
    """Optional. Price of a million completion tokens, in the same currency."""

    @model_validator(mode="after")
    def _budget_has_prices(self) -> EndpointConfig:
        if self.budget is not None and (self.price_read is None or self.price_written is None):
            raise ValueError("budget needs price_read and price_written; set both, or use budget_tokens")
        return self


class CombinedConfig(JudgeConfig):
    """Settings of `judge = "combined"`."""

    judges: tuple[str, ...] = ("pairwise", "pointwise", "agreement")
    """The judges that are combined: two or more that ask the model of the run."""
    pairs: Annotated[int, Field(ge=16, strict=True)] = 256
    """Number of first pairs of a round from whose verdicts the accuracies of the judges are estimated."""
    agreement: AgreementConfig = AgreementConfig()
    """Settings of `agreement`, if it is one of the judges. `pointwise` has the rubric of the templates folder."""

    @field_validator("judges")
    @classmethod
    def _can_be_combined(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        allowed = [name for name, spec in JUDGES.items() if not spec.is_remote and not spec.combines]
        for name in value:
            check_name(name, allowed, "judge")
        if len(set(value)) != len(value) or len(value) < 2:
            raise ValueError(f"must be two or more different judges of {', '.join(allowed)}")
        return value


class PointwiseConfig(JudgeConfig):
    """Settings of `judge = "pointwise"`."""

    rubric: str = ""
    """Optional. TOML file with the criterion and the grades (docs/algorithms/judging.md#pointwise). Default: `rubric.toml` of
    the templates folder."""


class CalibrationConfig(Section):
    """Calibration of the judge's probabilities: `[verdicts.calibration]` (docs/algorithms/judging.md#calibration)."""

    map: Literal["slope", "temperature", "isotonic"] = "slope"
    """`slope`: a factor of the log-odds; `temperature`, `isotonic`: all signals of a verdict, combined by a regression, then
    a temperature or an isotonic regression, which needs 200 looks (two of each question) on consistency or 200 labels."""
    method: Literal["consistency", "given", "off"] = "consistency"
    """`consistency`: fitted to the agreement of both orders, if the judge asks both; `given`: the values below; or `off`."""
    pairs: Annotated[int, Field(ge=50, strict=True)] = 256
    """Number of first pairs of a round that `consistency` is fitted to, rounded up to whole shards."""
    slope: Annotated[float, Field(ge=0.0)] = 1.0
    """With `given`: factor of the log-odds of a verdict, summed over both orders, as `selfeval judge-check` prints it."""
    truncated_slope: Annotated[float, Field(ge=0.0)] = 1.0
    """With `given`: the same for a verdict with an output that was cut off, which has one only with `truncated = "force"`."""
    bias: float = 0.0
    """With `given`: log-odds by which the judge favours the reply shown first."""
    weights: tuple[float, ...] = ()
    """With `given` and another map than `slope`: weights of swap agreement, margin, vote entropy, disagreement and truncation,
    as `selfeval judge-check` prints them; `slope` is then the inverse of the temperature."""
    steps: tuple[tuple[float, Share], ...] = ()
    """With `given` and `isotonic`: points (size of the logit, probability) of the isotonic regression."""

    @model_validator(mode="after")
    def _has_what_its_map_needs(self) -> CalibrationConfig:
        if self.method != "given":
            return self
        if self.map == "slope" and (self.weights or self.steps):
            raise ValueError('weights and steps are settings of map = "temperature" or "isotonic"; set map, or remove them')
        if self.map != "slope" and len(self.weights) != SIGNAL_COUNT:
            raise ValueError(
                f'map = "{self.map}" with method = "given" needs {SIGNAL_COUNT} weights, got {len(self.weights)}; '
                "copy them from `selfeval judge-check`"
            )
        if (self.map == "isotonic") != bool(self.steps):
            raise ValueError(f'map is "{self.map}" and steps has {len(self.steps)} points; only "isotonic" needs points')
        if list(self.steps) != sorted(self.steps) or [p for _, p in self.steps] != sorted(p for _, p in self.steps):
            raise ValueError("steps must ascend in the size of the logit and in the probability")
        return self


RUBRIC = "rubric.toml"
"""Rubric of a templates folder."""


@dataclass(frozen=True)
class TemplateKind:
    """A kind of prompt template: the file `NAME.jinja` of a templates folder.

    Attributes:
        name: name of the kind.
        sample: variables of the template, with a sample value of each that is used to check it.
        settings: keys of templates.toml that its prompts depend on, in addition to its labels.
        labels: names of the verdict labels in its table `[NAME]` of templates.toml, at least two; empty if it has no table.
        flags: further variables, true or false, that the template need not read.
        rubric: whether its verdict labels, and further variables (`Rubric.shown`), come from `rubric.toml` of the folder.
    """

    name: str
    sample: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    rubric: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Files of a templates folder that its prompts depend on, besides templates.toml."""
        return (f"{self.name}.jinja", *((RUBRIC,) if self.rubric else ()))


@dataclass(frozen=True)
class JudgeSpec:
    """Facts that the rest of the package needs about a judge before it is imported.

    Attributes:
        name: value of `verdicts.judge`, and name of the judge's section, `[verdicts.NAME]`.
        implementation: `module:object` in `judging/judges/`; the object takes a `JudgeContext` and returns a `Judge`.
        summary: one line for the documentation.
        templates: kinds of templates that it reads in each role. A role without an entry needs no template. A judge that is
            combined from others reads those of its members; see `VerdictsConfig.kinds`.
        config: class of its section; None if it has no settings besides those of `[verdicts]`.
        replies_per_prompt: number of replies that a prompt of the role `judge` shows; the planner counts them. Default: 2.
        can_answer_at_once: whether it writes nothing with `verdicts.reasoning = false`. Default: True.
        samples_votes: whether it samples `verdicts.votes` chains of thought per prompt. Default: False.
        outputs: noun for the outputs of the model that a verdict is read from, in the findings of the probe. Default: orders.
        compares: how it compares two replies, for the model card. Default: in both orders.
        combines: whether it combines other judges. Default: False.
        asks_both_orders: whether a comparison is asked in both orders, whose agreement can be measured. Default: False.
        is_remote: whether it asks a server in place of the model of the run. Default: False.
    """

    name: str
    implementation: str
    summary: str
    templates: Mapping[JudgeRole, tuple[TemplateKind, ...]] = field(default_factory=dict)
    config: type[JudgeConfig] | None = None
    replies_per_prompt: int = 2
    can_answer_at_once: bool = True
    samples_votes: bool = False
    outputs: str = "orders"
    compares: str = "in both orders"
    combines: bool = False
    asks_both_orders: bool = False
    is_remote: bool = False

    def kinds(self, role: JudgeRole) -> tuple[str, ...]:
        """Return the names of the kinds of templates that it reads in a role."""
        return tuple(kind.name for kind in self.templates.get(role, ()))


REPLY = TemplateKind("reply", {"question": "How many apples does Mary have?"}, ("grade_reference_answer",))
"""Prompt of a reply. The reference answers that `grade` shows are written along with the replies."""

_PAIR = {"question": "How many apples does Mary have?", "first": "She has five.", "second": "Mary has six."}
_BETTER = ("first", "second", "tie")
_CUT = ("first_cut", "second_cut")
_REPLY_ALONE = {"question": "How many apples does Mary have?", "reply": "She has five."}


def _registry(*specs: JudgeSpec) -> dict[str, JudgeSpec]:
    return {spec.name: spec for spec in specs}


_COMPARING: Mapping[JudgeRole, tuple[TemplateKind, ...]] = {
    # Two kinds with the same variables: the referee needs prompts that labelled no training pair.
    "judge": (TemplateKind("judge", _PAIR, labels=_BETTER, flags=_CUT),),
    "referee": (TemplateKind("referee", _PAIR, labels=_BETTER, flags=_CUT),),
}

JUDGES: dict[str, JudgeSpec] = _registry(
    JudgeSpec(
        "pairwise",
        "pairwise:PairwiseJudge",
        "The base model, prompted to compare two replies in both orders.",
        templates=_COMPARING,
        samples_votes=True,
        asks_both_orders=True,
    ),
    JudgeSpec(
        "pointwise",
        "pointwise:PointwiseJudge",
        "The base model, prompted to grade each reply alone by a rubric; the reply with the higher grade is better.",
        templates={"judge": (TemplateKind("pointwise", _REPLY_ALONE, flags=("cut", "reasoning"), rubric=True),)},
        config=PointwiseConfig,
        replies_per_prompt=1,
        samples_votes=True,
        outputs="gradings",
        compares="by grading each of them alone",
    ),
    JudgeSpec(
        "agreement",
        "agreement:AgreementJudge",
        "A vote of further replies on the final answer of the question: a reply with the majority's answer is better.",
        templates={"judge": (REPLY,)},
        config=AgreementConfig,
        replies_per_prompt=0,
        can_answer_at_once=False,
        outputs="votes",
        compares="by a vote of further replies on the final answer",
    ),
    JudgeSpec(
        "endpoint",
        "endpoint:EndpointJudge",
        "A model at a server with the OpenAI chat-completions protocol, prompted to compare two replies in both orders.",
        templates=_COMPARING,
        config=EndpointConfig,
        asks_both_orders=True,
        is_remote=True,
    ),
    JudgeSpec(
        "combined",
        "combined:CombinedJudge",
        "Several of the judges above, weighted by the accuracies that their agreement on the first pairs shows.",
        config=CombinedConfig,
        can_answer_at_once=False,
        samples_votes=True,
        outputs="outputs",
        combines=True,
        compares="by several judges, weighted by the accuracies that their agreement shows",
    ),
)
"""The judges by name. Registering a judge here is enough to configure and use it, and to check its templates."""

REFEREE = "pairwise"
"""The judge in the role of referee, unless `[evaluation.referee]` names a server. It does not depend on `verdicts.judge`, so
evaluations are comparable."""
_REFEREES = (REFEREE, "endpoint")


def judge_spec(role: JudgeRole, name: str) -> JudgeSpec:
    """Return the registry entry of the judge in a role.

    Args:
        role: role of the judge.
        name: `judge` of the settings for the role (`RunConfig.judging`). A judge that cannot be the referee is replaced by
            `REFEREE` in that role.
    """
    return JUDGES[REFEREE if role == "referee" and name not in _REFEREES else name]
