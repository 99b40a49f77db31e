"""Load the configuration of a run from a recipe, options and `--set`, with errors that name the source of a problem."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from selfeval.config.learners import LEARNERS
from selfeval.config.policy import PolicyConfig
from selfeval.config.run import RunConfig
from selfeval.errors import ConfigError, RunFolderError
from selfeval.texts import has_half_character, nearest, read_text, shortened, visible

__all__ = ["config_of_run", "load_config"]


def _allowed_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        if model is PolicyConfig and part in LEARNERS:
            model = LEARNERS[str(part)].config
            continue
        found = model.model_fields.get(str(part))
        annotation = found.annotation if found else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    fields = [name for name, field in model.model_fields.items() if field.validation_alias is None]
    return [*fields, *LEARNERS] if model is PolicyConfig else fields


_OPTIONS = {
    "trust_remote_code": (
        "a recipe cannot allow a model's own code to run; give the option --trust-remote-code to the command if you trust "
        "that code"
    )
}
"""Former keys that are now command options only, because no file may set them."""


def _explain(error: ValidationError, sources: Mapping[str, str], recipe: str, learner: str) -> ConfigError:
    """Describe every problem in one message, each prefixed with the source of the value.

    Args:
        error: raised by pydantic.
        sources: by dotted key, the source of each value that is not from the recipe.
        recipe: source of all other values.
        learner: value of `policy.learner`.
    """
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        found.setdefault(_source(problem["loc"], sources, recipe), []).append(_problem(problem, learner))
    return ConfigError("; ".join(f"{source}: {'; '.join(lines)}" for source, lines in found.items()))


def _problem(problem: Any, learner: str) -> str:
    key = visible(".".join(str(part) for part in problem["loc"]))
    if key in _OPTIONS:
        return f'unknown key "{key}": {_OPTIONS[key]}'
    if problem["type"] == "extra_forbidden":
        if reason := _of_a_learner(problem["loc"], learner):
            return reason
        return f'unknown key "{key}"{nearest(str(problem["loc"][-1]), _allowed_at(problem["loc"][:-1]))}'
    try:
        got = json.dumps(problem["input"], default=str)
    except ValueError:  # an integer with thousands of digits
        got = "a number of thousands of digits"
    return f"{key}: got {shortened(got)}; {problem['msg'].removeprefix('Value error, ')}"


def _of_a_learner(location: Sequence[str | int], learner: str) -> str | None:
    """Explain a policy key that belongs to a learner's section; None for other keys."""
    if len(location) < 2 or location[0] != "policy":
        return None
    name = str(location[-1])
    if len(location) == 2 and name in LEARNERS:
        return f'policy.{name}: policy.learner is "{learner}", and only its section may be given; set policy.learner = "{name}"'
    if learner in LEARNERS and location[1] != learner and name in LEARNERS[learner].config.model_fields:
        return f'"policy.{name}" is a setting of the learner; give it as policy.{learner}.{name}'
    owners = [spec.name for spec in LEARNERS.values() if name in spec.config.model_fields]
    if not owners:
        return None
    return f'"{".".join(map(str, location))}" is not a setting of {learner}; learners with it: {", ".join(owners)}'


def _source(location: Sequence[str | int], sources: Mapping[str, str], recipe: str) -> str:
    """Return the source of a value: that of the longest given key that contains the location, or that it contains."""
    key = ".".join(str(part) for part in location) + "."
    above = [given for given in sources if key.startswith(f"{given}.")]
    below = [given for given in sources if f"{given}.".startswith(key)]
    given = max(above, key=len, default=None) or next(iter(below), None)
    return recipe if given is None else sources[given]


def _parse_value(text: str) -> Any:
    if text in ("", "none"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # plain words; anything invalid is refused later, with its key
        return text


def _override(values: dict[str, Any], assignment: str) -> str:
    """Set one value and return its dotted key."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set policy.iterations=20")
    *path, last = key.strip().split(".")
    section = values
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f'--set {assignment}: "{part}" is a value, not a section')
    section[last] = _parse_value(text.strip())
    return key.strip()


_LARGEST_RECIPE = 1 << 20


def _read_recipe(path: Path) -> dict[str, Any]:
    remedy = "give the path of a .toml recipe"
    text = read_text(path, "recipe", ConfigError, most=_LARGEST_RECIPE, remedy=remedy)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, an integer with thousands of digits, or nested too deeply
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"recipe {path} is not valid TOML: {reason}") from error
    if has_half_character(values):
        raise ConfigError(f"recipe {path} holds half a surrogate pair; write whole characters")
    for place, key in _paths_in(values):
        if _is_there(beside := Path(os.path.realpath(path)).parent / place[key]):
            place[key] = str(beside)
    return values


_PATHS = ("model", "seeds", "templates", "gold", "questions.file", "replies.file", "pairs.file")


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


_FOLDER_NAME = "the last part of the folder that was given (it names the run)"


def load_config(recipe: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str] = ()) -> RunConfig:
    """Return the resolved configuration of a run.

    Args:
        recipe: Optional. Path of a TOML file. None: use the defaults.
        overrides: top-level values that override the recipe (from options such as `--model`).
        assignments: `key=value` strings that override both; keys are dotted, values are TOML or plain words.

    Raises:
        ConfigError: a file is not TOML, a key is unknown (the message suggests the nearest one), or a value has the wrong type
            or range.
    """
    values = _read_recipe(recipe) if recipe else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    values.update(given)
    sources = {key: _FOLDER_NAME if key == "name" else f"--{key.replace('_', '-')} {value}" for key, value in given.items()}
    learner = _learner_of(values)
    for assignment in assignments:
        sources[_override(values, assignment)] = f"--set {assignment}"
    if "policy" in given and (now := _learner_of(values)) != learner:  # the stored section is of another learner
        values["policy"] = {key: value for key, value in values["policy"].items() if key != learner or key == now}
    for place, key in _paths_in(values):
        if _is_there(Path(place[key])):  # the next command may be run in another directory
            place[key] = os.path.abspath(place[key])
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, sources, f"recipe {recipe}" if recipe else "configuration", _learner_of(values)) from error


def _learner_of(values: Mapping[str, Any]) -> str:
    policy = values.get("policy")
    default = PolicyConfig.model_fields["learner"].default
    return str(policy.get("learner", default) if isinstance(policy, dict) else default)


def config_of_run(values: Any, where: Path) -> RunConfig:
    """Return the configuration stored by a run.

    Args:
        values: `config` of its run.json.
        where: path of that file, for the message.

    Raises:
        RunFolderError: the values were written by another version.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        keys = sorted({".".join(str(part) for part in problem["loc"]) or "all of it" for problem in error.errors()})
        shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        raise RunFolderError(
            f"{where} holds the configuration of another version of selfeval (not read: {shown}). Use the version that is "
            "noted in its run.json, or start a new run: selfeval run RECIPE --output NEW"
        ) from error
