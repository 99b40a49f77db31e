"""Servers that a run.json names: asked only if the command, or the caller, names them too.

A run folder may come from somebody else. Its texts, and an API key from the environment, must not be sent to a server that the
user did not choose. All commands have this rule: those that resume a run, those that search it, and those that use its judge.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from selfeval.config import EmbeddingEndpointConfig, RunConfig, ServerConfig, load_config
from selfeval.errors import InputError, RunFolderError

__all__ = ["is_named_by", "named_servers", "refuse_servers", "with_embedding_server", "with_judge_server", "with_servers"]

_OFF = {
    "verdicts.endpoint": "verdicts.judge=pairwise to judge with the model of the run",
    "evaluation.referee": "evaluation.referee=none to judge with the model of the run",
    "embeddings.endpoint": "embeddings.embedder=backbone to embed with the model of the run",
}
_KEYS = ("url", "key_variable")


def refuse_servers(run: Path, servers: Mapping[str, ServerConfig], is_named: Callable[[str], bool]) -> None:
    """Refuse the servers of a run.json, and the variables with their keys, that are not named by the user.

    Args:
        run: the run folder.
        servers: servers that would be asked, by the dotted name of their section.
        is_named: whether the user named a dotted key.

    Raises:
        RunFolderError: there is one.
    """
    for section, settings in servers.items():
        values = {f"{section}.{key}": getattr(settings, key) for key in _KEYS}
        unnamed = {key: value for key, value in values.items() if value and not is_named(key)}
        if unnamed:
            asked = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in unnamed.items())
            shown = ", ".join(f"{key} = {value}" for key, value in unnamed.items())
            raise RunFolderError(
                f"{run / 'run.json'} sets {shown}, and texts of the run would be sent there; that is done only if you name the "
                f'server too: add {asked} (in Python: servers=["KEY=VALUE", ...]), or --set {_OFF[section]}'
            )


def is_named_by(assignments: Sequence[str]) -> Callable[[str], bool]:
    """Return whether `key=value` strings name a dotted key, or a section that contains it."""
    named = [assignment.partition("=")[0].strip() for assignment in assignments]
    return lambda key: any(f"{key}.".startswith(f"{given}.") for given in named)


def with_servers(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the configuration of a run with servers that the user named.

    Args:
        config: the configuration.
        assignments: `key=value` strings for `url` and `key_variable` of a server, or for the choice that needs none.

    Raises:
        InputError: another setting is named; a run has its own.
        ConfigError: a value is wrong.
    """
    allowed = [f"{section}.{key}" for section in _OFF for key in _KEYS]
    allowed += [instead.partition("=")[0] for instead in _OFF.values()]
    for assignment in assignments:
        if (key := assignment.partition("=")[0].strip()) not in allowed:
            raise InputError(
                f'a run has its own settings, so "{key}" cannot be set here; allowed: {", ".join(sorted(set(allowed)))}'
            )
    return load_config(None, config.model_dump(mode="json"), assignments) if assignments else config


def with_judge_server(run: Path, recorded: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the configuration of a run whose judge is asked; see `with_servers` and `refuse_servers`.

    Raises:
        RunFolderError: the judge is a server that is not named.
    """
    config = with_servers(recorded, assignments)
    used = {section: settings for section, settings in config.servers.items() if section == "verdicts.endpoint"}
    refuse_servers(run, used, is_named_by(assignments))
    return config


def with_embedding_server(run: Path, recorded: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the configuration of a run whose embedder is asked; see `with_servers` and `refuse_servers`.

    Raises:
        RunFolderError: the embedder is a server that is not named.
    """
    config = with_servers(recorded, assignments)
    refuse_servers(run, _embedding_servers(config), is_named_by(assignments))
    return config


def _embedding_servers(config: RunConfig) -> dict[str, ServerConfig]:
    """Return the server of the embedder, if it is one, by the dotted name of its section."""
    settings = config.embeddings.settings
    return {"embeddings.endpoint": settings} if isinstance(settings, EmbeddingEndpointConfig) else {}


def named_servers(config: RunConfig) -> list[str]:
    """Return the `key=value` strings that name all servers of a configuration which the user gave."""
    servers: dict[str, ServerConfig] = {**config.servers, **_embedding_servers(config)}
    return [f"{section}.{key}={getattr(settings, key)}" for section, settings in servers.items() for key in _KEYS]
