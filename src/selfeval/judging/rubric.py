"""The rubric of the pointwise judge: a criterion and the grades that a reply can have.

A templates folder has a default rubric in the language of its prompts, `rubric.toml`. `verdicts.pointwise.rubric` names the
user's own file, which takes its place: from then on it is one of the texts of the folder, is copied into the run folder with
them, and is part of the key of the verdicts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selfeval.config import RUBRIC
from selfeval.errors import ConfigError, InputError, ModelError
from selfeval.judging.labels import Labels
from selfeval.texts import read_text

__all__ = ["Grade", "Rubric", "parse_rubric", "with_rubric"]

_LARGEST = 1 << 16
_REMEDY = "pass the path of a rubric, a .toml file with criterion, lead and [[grades]] (docs/algorithms/judging.md#pointwise)"

_Number = Annotated[float, Field(allow_inf_nan=False)]


class Grade(BaseModel):
    """One of the grades of a rubric.

    Attributes:
        label: text of the grade right after the lead, with the space between them.
        value: number that the grade stands for; a better reply has a higher one.
        meaning: Optional. Description of the replies that have this grade. Default: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[str, Field(min_length=1)]
    value: _Number
    meaning: str = ""

    @property
    def name(self) -> str:
        """The label without spaces."""
        return self.label.strip()


class Rubric(BaseModel):
    """A rubric.

    Attributes:
        criterion: what the grade is about, as a sentence of the prompt.
        lead: text right before the grade in the judge's output. Default: none.
        grades: 2 to 16 grades, with different labels and values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    criterion: str = ""
    lead: str = ""
    grades: Annotated[tuple[Grade, ...], Field(min_length=2, max_length=16)]

    @model_validator(mode="after")
    def _grades_differ(self) -> Rubric:
        for one, other in combinations(self.grades, 2):
            if not one.name or not other.name or one.name.casefold() == other.name.casefold():
                raise ValueError(f'grades have the labels "{one.label}" and "{other.label}"; give each grade a different one')
            if one.value == other.value:
                raise ValueError(
                    f"the grades {one.name} and {other.name} have the same value, {one.value:g}; set different ones"
                )
        return self

    @property
    def labels(self) -> Labels:
        """The grades as verdict labels, in the order of the rubric."""
        return Labels.model_validate({"lead": self.lead, **{grade.name: grade.label for grade in self.grades}})

    @property
    def values(self) -> tuple[float, ...]:
        """The values of the grades, in the order of the rubric."""
        return tuple(grade.value for grade in self.grades)

    @property
    def shown(self) -> dict[str, str | list[str]]:
        """Variables of the template: `criterion`; `grades`, each as `label: meaning`; `answers`, each as lead and label."""
        described = [f"{grade.name}: {grade.meaning}" for grade in self.grades if grade.meaning]
        return {
            "criterion": self.criterion,
            "grades": described,
            "answers": [f"{self.lead}{grade.label}".strip() for grade in self.grades],
        }


def parse_rubric(text: str, source: Path | str, error: type[InputError] = ModelError) -> Rubric:
    """Return the rubric in a TOML text.

    Args:
        text: content of the file.
        source: its path, for messages.
        error: class of the errors.

    Raises:
        InputError: an instance of `error`; the text is not TOML, a key is unknown, or a value is not allowed.
    """
    try:
        return Rubric.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise error(f"rubric {source} is not valid TOML: {problem or 'nested too deeply'}") from problem
    except ValidationError as problem:
        raise error(f"rubric {source}: {'; '.join(map(_described, problem.errors()))}") from problem


def _described(problem: object) -> str:
    found: Mapping[str, object] = problem  # type: ignore[assignment]
    place = ".".join(map(str, found["loc"]))  # type: ignore[call-overload]
    message = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        allowed = Grade.model_fields if place.startswith("grades.") else Rubric.model_fields
        return f"unknown key {place}; allowed: {', '.join(allowed)}"
    return f"{place}: {message}" if place else message


def with_rubric(texts: Mapping[str, str], file: str) -> dict[str, str]:
    """Return the texts of a templates folder with the user's rubric instead of the folder's.

    Args:
        texts: texts by file name.
        file: `verdicts.pointwise.rubric`; an empty one keeps that of the folder.

    Raises:
        ConfigError: the file cannot be read, or is not a rubric.
    """
    if not file:
        return dict(texts)
    text = read_text(Path(file), "rubric", ConfigError, most=_LARGEST, remedy=_REMEDY)
    parse_rubric(text, file, ConfigError)
    return {**texts, RUBRIC: text}
