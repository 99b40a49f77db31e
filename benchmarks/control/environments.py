"""Gymnasium's classic-control tasks, several copies side by side, and the evaluation of a finished policy.

Gymnasium is not a dependency of the package: `install` installs it, and nothing else, into build/gymnasium. Its
environments are used unchanged.

Shapes: E environments, O observation, A action (absent where actions are discrete).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

HOME = Path(__file__).resolve().parents[2] / "build" / "gymnasium"
# Everything that Gymnasium imports besides NumPy, without transitive dependencies, to keep the project's version of NumPy.
REQUIREMENTS = ("gymnasium==1.4.0", "cloudpickle==3.1.3", "farama-notifications==0.0.6")

Act = Callable[[Tensor], Tensor]
"""Observations [E, O] -> the actions [E] or [E, A] that a finished policy takes."""


@dataclass(frozen=True)
class Space:
    """Sizes of observation and action: one of `actions` choices or, with a `bound`, `actions` numbers within ±`bound`."""

    observations: int
    actions: int
    bound: float | None = None


class Step(NamedTuple):
    """Result of one step of every environment."""

    rewards_E: Tensor
    terminated_E: Tensor  # the episode ended: nothing follows
    truncated_E: Tensor  # the episode was cut by its time limit: the future was still worth something
    successors_EO: Tensor  # where the actions led, also at the end of an episode
    observations_EO: Tensor  # where to act next: a fresh start after the end of an episode


class Environments(Protocol):
    """Copies of one task that step together and reset automatically."""

    count: int
    space: Space

    def reset(self) -> Tensor: ...

    def step(self, actions: Tensor) -> Step: ...


class Gymnasium:
    """Copies of one of Gymnasium's tasks."""

    def __init__(self, task: str, count: int, seed: int) -> None:
        gymnasium = installed()
        make = lambda: gymnasium.make(task, disable_env_checker=True)  # noqa: E731
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        self._copies = gymnasium.vector.SyncVectorEnv([make] * count, autoreset_mode=same_step)
        self._seed = seed
        observed, action = self._copies.single_observation_space, self._copies.single_action_space
        discrete = hasattr(action, "n")
        self.count = count
        self.space = Space(
            observed.shape[0], int(action.n) if discrete else action.shape[0], None if discrete else action.high[0]
        )

    def reset(self) -> Tensor:
        """Reset every copy with the seed."""
        observations_EO, _ = self._copies.reset(seed=self._seed)
        return torch.from_numpy(observations_EO)

    def step(self, actions: Tensor) -> Step:
        """Step every copy; actions are clipped to their range."""
        bound = self.space.bound
        taken = actions.numpy() if bound is None else actions.clamp(-bound, bound).numpy()
        observations_EO, rewards_E, terminated_E, truncated_E, found = self._copies.step(taken)
        successors_EO = observations_EO.copy()
        for place in np.flatnonzero(terminated_E | truncated_E):
            successors_EO[place] = found["final_obs"][place]
        rewards_E, observations_EO = rewards_E.astype(np.float32), observations_EO.copy()
        return Step(*map(torch.from_numpy, (rewards_E, terminated_E, truncated_E, successors_EO, observations_EO)))


def install() -> None:
    """Install Gymnasium into build/gymnasium unless it is there."""
    if not (HOME / "ready").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(HOME), *REQUIREMENTS], check=True)
        (HOME / "ready").touch()


def installed() -> Any:
    """Return the module `gymnasium` from build/gymnasium."""
    if str(HOME) not in sys.path:
        sys.path.append(str(HOME))
    import gymnasium

    return gymnasium


@torch.no_grad()
def evaluate(act: Act, environments: Environments) -> list[float]:
    """Return the sum of rewards of each copy's first episode."""
    observations_EO = environments.reset()
    returns_E, running_E = torch.zeros(environments.count), torch.ones(environments.count, dtype=torch.bool)
    while running_E.any():
        step = environments.step(act(observations_EO))
        returns_E += step.rewards_E * running_E
        running_E &= ~(step.terminated_E | step.truncated_E)
        observations_EO = step.observations_EO
    return [float(value) for value in returns_E]
