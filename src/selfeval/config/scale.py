"""The section `[scale]`: work on several processes and machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfeval.config.fields import Count, CountOrNone, Section

__all__ = ["ScaleConfig"]


class ScaleConfig(Section):
    """Work on several processes and machines (docs/guides/scale.md)."""

    poisoned: Literal["stop", "skip"] = "stop"
    """What to do with a shard whose work fails four times: `stop` the stage, or `skip` the shard. Both list it in dropped/."""
    slow: Annotated[float, Field(ge=1.0)] = 3.0
    """Multiple of the median time of a shard after which an idle worker computes it too; the first result counts."""
    threads: CountOrNone = None
    """Optional. CPU threads of a worker. Default: the cores of a machine shared by its workers; `selfeval run` records it."""
    gpus: Count = 1
    """GPUs of a worker, if the run uses GPUs; the base is placed on them as in one process."""
