"""Train a tiny policy in child processes that are killed at random moments, until it is done; print where each kill struck.

python tests/killed_training.py FOLDER KILLS SEED [setting=value ...]

One process imports everything and forks, so a kill costs milliseconds instead of an import of torch. Every third kill strikes
inside the write of a checkpoint: after its tensors are written and before the folder gets its name.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from policies import CONFIG, changed, four_roles, train
from selfeval.training import checkpoint
from selfeval.training.context import CRITIC, POLICY

ITERATIONS = 56


def once(folder: Path, settings: dict[str, Any], *, kill_in_write: bool) -> None:
    """Train from where the last process was killed; write the final weights at the end."""
    if kill_in_write:
        original, writes = checkpoint.write_json, []

        def killing(path: Path, content: Any) -> None:
            writes.append(path)
            if len(writes) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, content)

        checkpoint.write_json = killing
    backbone = four_roles()
    config = changed(CONFIG, **{"iterations": ITERATIONS, "checkpoint_every": 1, **settings})
    train(backbone, folder / "checkpoints", config)
    tensors = {
        f"{role}/{n}": p.detach().clone() for role in (POLICY, CRITIC) for n, p in backbone.roles.parameters(role).items()
    }
    save_file(tensors, folder / "final.safetensors")


def forked(folder: Path, settings: dict[str, Any], seconds: float | None, *, kill_in_write: bool = False) -> bool:
    """Return whether a child finished training before it was killed; it is not killed if `seconds` is None."""
    child = os.fork()
    if child == 0:
        once(folder, settings, kill_in_write=kill_in_write)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    settings = {name: json.loads(value) for name, value in (argument.split("=") for argument in sys.argv[4:])}
    torch.set_num_threads(1)
    (folder / "through").mkdir(parents=True)
    started = time.monotonic()
    four_roles()
    setup = time.monotonic() - started
    assert forked(folder / "through", settings, None)
    step = (time.monotonic() - started - 2 * setup) / ITERATIONS
    rng, found = random.Random(seed), {"kills": 0, "in_write": 0, "resumed_at": []}
    (folder / "killed").mkdir()
    while found["kills"] < kills:
        in_write = found["kills"] % 3 == 2
        wait = None if in_write else setup + rng.uniform(0.0, 3.0) * step
        if forked(folder / "killed", settings, wait, kill_in_write=in_write):
            break
        found["kills"] += 1
        found["in_write"] += in_write
        found["resumed_at"] += sorted(p.name for p in (folder / "killed" / "checkpoints").glob("step-*"))
    if not (folder / "killed" / "final.safetensors").is_file():
        assert forked(folder / "killed", settings, None)
    same = (folder / "through" / "final.safetensors").read_bytes() == (folder / "killed" / "final.safetensors").read_bytes()
    print(json.dumps({**found, "same_bytes": same}))


if __name__ == "__main__":
    main()
