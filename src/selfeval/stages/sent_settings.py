"""The settings of a run as they are sent to workers, which may run in another folder and on another machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfeval.config import RunConfig, load_config

__all__ = ["SentSettings", "sent_settings"]


@dataclass(frozen=True)
class SentSettings:
    """Settings with absolute paths, and the keys of the servers that they name.

    Attributes:
        config: the configuration.
        keys: environment variables with the API keys of its servers. Not shown: tasks are logged.
    """

    config: RunConfig
    keys: tuple[tuple[str, str], ...] = field(repr=False)

    def receive(self) -> RunConfig:
        """Set the keys in this process, unless it has others, and return the configuration."""
        for name, value in self.keys:
            os.environ.setdefault(name, value)
        return self.config


def sent_settings(config: RunConfig, environment: Mapping[str, str] = os.environ) -> SentSettings:
    """Return the settings for workers.

    Args:
        config: configuration of the run, with paths that are relative to the folder of this process.
        environment: Optional. Variables of this process. Default: its environment.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    placement = values["backbone"]["placement"]
    if placement["folder"]:  # the one path that need not exist yet
        placement["folder"] = str(Path(placement["folder"]).absolute())
    names = sorted({server.key_variable for server in config.all_servers.values()} & environment.keys())
    return SentSettings(load_config(None, values), tuple((name, environment[name]) for name in names))
