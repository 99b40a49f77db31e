"""Load the configuration of a run from a recipe, options and `--set`, with errors that name the source of a problem."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from selfeval.config.backbone import BackboneConfig
from selfeval.config.choices import Entry
from selfeval.config.embeddings import EMBEDDERS, EmbeddingsConfig
from selfeval.config.judges import JUDGES
from selfeval.config.learners import LEARNERS
from selfeval.config.policy import PolicyConfig
from selfeval.config.run import RunConfig
from selfeval.config.sections import VerdictsConfig
from selfeval.errors import ConfigError, RunFolderError
from selfeval.texts import has_half_character, nearest, read_text, shortened, visible

__all__ = ["config_of_run", "load_config"]


@dataclass(frozen=True)
class _Choice:
    """A setting that chooses an entry of a registry, whose own settings are a section with its name.

    Attributes:
        model: section of the configuration that contains both.
        key: name of the setting.
        registry: entries by name.
    """

    model: type[BaseModel]
    key: str
    registry: Mapping[str, Entry]

    def section(self, name: str) -> type[BaseModel] | None:
        """Return the class of an entry's section; None if it has none, or if there is no such entry."""
        return self.registry[name].config if name in self.registry else None

    def fields(self, name: str) -> Collection[str]:
        """Return the names of an entry's settings."""
        section = self.section(name)
        return () if section is None else section.model_fields

    def chosen(self, values: Any) -> str:
        """Return the entry that the values of the section choose, registered or not."""
        default = self.model.model_fields[self.key].default
        return str(values.get(self.key, default) if isinstance(values, dict) else default)


_CHOICES = {
    "policy": _Choice(PolicyConfig, "learner", LEARNERS),
    "verdicts": _Choice(VerdictsConfig, "judge", JUDGES),
    "embeddings": _Choice(EmbeddingsConfig, "embedder", EMBEDDERS),
}
"""The choices by section of the configuration."""
_CHOICES_BY_MODEL: dict[type[BaseModel], _Choice] = {choice.model: choice for choice in _CHOICES.values()}


def _chosen(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the chosen entry of every choice, by section."""
    return {section: choice.chosen(values.get(section)) for section, choice in _CHOICES.items()}


def _allowed_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        choice = _CHOICES_BY_MODEL.get(model)
        if choice is not None and (section := choice.section(str(part))) is not None:
            model = section
            continue
        if isinstance(part, int):  # an entry of a list of tables, whose model was found by the name of the list
            continue
        found = model.model_fields.get(part)
        # Follow the location into nested sections; the names allowed there are those of the last one.
        annotation = found.annotation if found else None
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    # The fields with an alias hold the section of a learner or judge, which a recipe gives by its name.
    fields = [name for name, field in model.model_fields.items() if field.validation_alias is None]
    choice = _CHOICES_BY_MODEL.get(model)
    return fields if choice is None else [*fields, *(name for name in choice.registry if choice.section(name) is not None)]


_OPTIONS = {
    "trust_remote_code": (
        "a recipe cannot enable custom model code; pass --trust-remote-code on the command line if you trust the code"
    ),
    "allow_code_execution": (
        "a recipe cannot allow that code in replies is executed; pass --allow-code-execution on the command line"
    ),
}
"""Command options that no file may set."""


_OF_THE_BACKBONE = {name: f"backbone.{name}" for name in BackboneConfig.model_fields}
"""Settings of the backbone, which are often given without their section, with their full key."""


def _explain(error: ValidationError, sources: Mapping[str, str], recipe: str, chosen: Mapping[str, str]) -> ConfigError:
    """Describe every problem in one message, each prefixed with the source of the value.

    Args:
        error: raised by pydantic.
        sources: by dotted key, the source of each value that is not from the recipe.
        recipe: source of all other values.
        chosen: learner and judge, by section.
    """
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        found.setdefault(_source(problem["loc"], sources, recipe), []).append(_problem(problem, chosen))
    return ConfigError("; ".join(f"{source}: {'; '.join(lines)}" for source, lines in found.items()))


def _problem(problem: Any, chosen: Mapping[str, str]) -> str:
    key = visible(".".join(str(part) for part in problem["loc"]))
    if key in _OPTIONS:
        return f'unknown key "{key}": {_OPTIONS[key]}'
    if problem["type"] == "extra_forbidden":
        if key in BackboneConfig.model_fields:
            return f'unknown key "{key}": it is a setting of the backbone; give it as backbone.{key}'
        if reason := _of_a_choice(problem["loc"], chosen):
            return reason
        *above, name = problem["loc"]
        return f'unknown key "{key}"{nearest(str(name), _allowed_at(above), {} if above else _OF_THE_BACKBONE)}'
    try:
        got = json.dumps(problem["input"], default=str)
    except ValueError:  # an integer with thousands of digits
        got = "a number with thousands of digits"
    return f"{key}: got {shortened(got)}; {problem['msg'].removeprefix('Value error, ')}"


def _of_a_choice(location: Sequence[str | int], chosen: Mapping[str, str]) -> str | None:
    """Explain a key that belongs to the section of a learner or judge; None for other keys."""
    section, name = str(location[0]), str(location[-1])
    if len(location) < 2 or section not in _CHOICES:
        return None
    choice, current = _CHOICES[section], chosen[section]
    if len(location) == 2 and choice.section(name) is not None:
        return (
            f'{section}.{name}: {section}.{choice.key} is "{current}", so only that section is allowed; set '
            f'{section}.{choice.key} = "{name}"'
        )
    if location[1] != current and name in choice.fields(current):
        return f'"{section}.{name}" is a setting of the {choice.key}; write it as {section}.{current}.{name}'
    owners = [owner for owner in choice.registry if name in choice.fields(owner)]
    if not owners:
        return None
    return f'"{".".join(map(str, location))}" is not a setting of {current}; {choice.key}s that have it: {", ".join(owners)}'


def _source(location: Sequence[str | int], sources: Mapping[str, str], recipe: str) -> str:
    """Return the source of a value: that of the longest given key that contains the location, or that it contains."""
    key = ".".join(str(part) for part in location) + "."
    # An option may have set the value itself, a section around it, or a part of it.
    above = [given for given in sources if key.startswith(f"{given}.")]
    below = [given for given in sources if f"{given}.".startswith(key)]
    given = max(above, key=len, default=None) or next(iter(below), None)
    return recipe if given is None else sources[given]


def _parse_value(text: str) -> Any:
    if text in ("", "none"):
        return None
    try:
        # TOML, so numbers, booleans and lists have the types that they have in a recipe.
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # plain words; anything invalid is refused later, with its key
        return text


def _override(values: dict[str, Any], assignment: str) -> str:
    """Set one value and return its dotted key."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set policy.iterations=20")
    _put(values, key.strip(), _parse_value(text.strip()), f"--set {assignment}")
    return key.strip()


def _put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set the value of a dotted key."""
    *path, last = key.split(".")
    section = values
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f'{source}: "{part}" is a value, not a section')
    section[last] = value


_LARGEST_RECIPE = 1 << 20


def _read_recipe(path: Path) -> dict[str, Any]:
    remedy = "pass the path of a .toml recipe"
    text = read_text(path, "recipe", ConfigError, most=_LARGEST_RECIPE, remedy=remedy)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, an integer with thousands of digits, or nested too deeply
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"recipe {path} is not valid TOML: {reason}") from error
    if has_half_character(values):
        raise ConfigError(f"recipe {path} contains an unpaired surrogate; write complete characters")
    for place, key in _paths_in(values):
        # Only if it exists there: a hub id such as org/name looks like a relative path.
        if _is_there(beside := Path(os.path.realpath(path)).parent / place[key]):
            place[key] = str(beside)
    return values


_PATHS = (
    *("model", "seeds", "templates", "gold", "questions.file", "replies.file", "pairs.file"),
    "verdicts.pointwise.rubric",
    "embeddings.sentence-transformers.model",
)


def _paths_in(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each path setting among the values: the section that contains it, and its key there."""
    for dotted in _PATHS:
        *sections, key = dotted.split(".")
        place: Any = values
        for name in sections:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(key), str) and place[key]:
            yield place, key


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # not a valid file name
        return False


_FOLDER_NAME = "the last component of the run folder (it names the run)"


def _option(key: str, value: Any) -> str:
    """Return the option that sets a dotted key, with its value: `--memory-budget 2GiB` for `backbone.memory_budget`."""
    return f"--{key.rpartition('.')[2].replace('_', '-')} {value}"


def _fill(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Set the values of dotted keys that are not set, except those of a learner or judge that is not chosen."""
    chosen = _chosen(values)
    for key, value in defaults.items():
        *path, last = key.split(".")
        if len(path) == 2 and path[0] in chosen and path[1] != chosen[path[0]]:
            continue
        section: Any = values
        for part in path:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):  # anything else is refused with its key
            section.setdefault(last, value)


def load_config(
    recipe: Path | None,
    overrides: Mapping[str, Any],
    assignments: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return the resolved configuration of a run.

    Args:
        recipe: Optional. Path of a TOML file. None: use the defaults.
        overrides: values by dotted key that override the recipe (from options such as `--model`).
        assignments: `key=value` strings that override both; keys are dotted, values are TOML or plain words.
        defaults: Optional. Values by dotted key for settings that nothing else sets, instead of the fields' own defaults.

    Raises:
        ConfigError: a file is not TOML, a key is unknown (the message suggests the nearest one), or a value has the wrong type
            or range.
    """
    values = _read_recipe(recipe) if recipe else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    sources = {key: _FOLDER_NAME if key == "name" else _option(key, value) for key, value in given.items()}
    for key, value in given.items():
        _put(values, key, value, sources[key])
    # The choices before `--set`, to notice below that it has replaced one.
    before = _chosen(values)
    for assignment in assignments:
        sources[_override(values, assignment)] = f"--set {assignment}"
    for section, now in _chosen(values).items():
        if section in given and now != before[section]:  # the stored section is of another learner or judge
            values[section] = {key: value for key, value in values[section].items() if key != before[section] or key == now}
    _fill(values, defaults or {})
    for place, key in _paths_in(values):
        if _is_there(Path(place[key])):  # the next command may be run in another directory
            place[key] = os.path.abspath(place[key])
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, sources, f"recipe {recipe}" if recipe else "configuration", _chosen(values)) from error


def _as_made(values: Any) -> Any:
    """Return stored settings with the values that an earlier version had where it had no setting yet."""
    verdicts = values.get("verdicts") if isinstance(values, dict) else None
    if not isinstance(verdicts, dict) or "calibration" in verdicts:
        return values
    return {**values, "verdicts": {**verdicts, "calibration": {"method": "off"}}}


def config_of_run(values: Any, where: Path) -> RunConfig:
    """Return the configuration stored by a run.

    Args:
        values: `config` of its run.json.
        where: path of that file, for the message.

    Raises:
        RunFolderError: the values were written by another version.
    """
    try:
        return RunConfig.model_validate(_as_made(values))
    except ValidationError as error:
        keys = sorted({".".join(str(part) for part in problem["loc"]) or "all" for problem in error.errors()})
        shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        raise RunFolderError(
            f"{where} was written by another version of selfeval (unsupported settings: {shown}). Use the version recorded in "
            "its run.json, or start a new run: selfeval run RECIPE --output NEW"
        ) from error
