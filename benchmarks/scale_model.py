"""Time and cost of a run on 1 to 512 GPUs: the formula, a simulation that checks it, and small runs measured on this machine.

python benchmarks/scale_model.py [--price 3.00] [--seeds 8] [--measure]

The formula is in scale_formula.py, the simulation in scale_simulation.py (simpy), the counts of a run in scale_work.py, GPUs
and assumptions in scale_hardware.py. With --measure, costs and runs of the embedded model on 1 and 2 workers are measured
again (scale_costs.py, scale_runs.py: five minutes of one core); otherwise those in results/scale_model.json are used.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import scale_costs
import scale_runs
from common import RESULTS, write
from scale_formula import (
    NONE,
    Alone,
    Chance,
    Map,
    Part,
    Phase,
    Training,
    daly_interval,
    iteration_seconds,
    run_seconds,
    seconds_of,
    training_seconds,
    young_interval,
)
from scale_hardware import GPUS, MODELS, SETUPS, Assumed, Gpu, Setup, costs_on
from scale_simulation import simulate, simulate_run
from scale_work import Costs, Load, parts_of

from selfeval.config import RunConfig, load_config
from selfeval.planner.stage_times import Lengths
from selfeval.quality.statistics import mean_figure

NAME = "scale_model"
SIZES = (1, 8, 64, 512)
POWERS = tuple(2**k for k in range(11))
PRICES = {"A100": 1.5, "H100": 3.0}
"""Price of a GPU hour, in any currency: assumed."""
LOSSES = 419 / (54 * 24 * 3600 * 16384)
"""Lost GPUs per GPU and second: 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, section 3.3.4)."""
DETECTED = 30.0
"""Seconds until a lost worker is noticed: assumed."""
SPREAD = {"work": 0.1, "machine": 0.05}
"""Coefficients of variation of the work of a shard and of the speed of workers: assumed, and varied."""
SLOW = 3.0
"""`scale.slow`."""

DEFAULT = Load(
    "default",
    RunConfig(),
    Lengths(ask=350, reply_prompt=60, grade=60, grade_alone=60, judge=350, question=40, reply=100, reasoning=100),
    kept=(0.8, 0.5),
)
LARGE = Load(
    "large",
    RunConfig.model_validate(
        {
            "questions": {"file": "questions.jsonl", "train": 100_000, "test": 1_000},
            "replies": {"max_new_tokens": 512},
            "verdicts": {"max_new_tokens": 512},
            "evaluator": {"batch": 256},
            "policy": {"iterations": 200, "questions_per_iteration": 1024, "replies_per_question": 8, "minibatch": 1024},
            "evaluation": {"questions": 1_000},
        }
    ),
    Lengths(ask=350, reply_prompt=60, grade=60, grade_alone=60, judge=750, question=40, reply=300, reasoning=300),
    kept=(0.8, 0.5),
)
LOADS = (DEFAULT, LARGE)


# -- predictions --------------------------------------------------------------------------------------------------------


class Machine:
    """GPUs, a model on them and the assumptions; `driver` and `handled` are costs measured on a CPU."""

    def __init__(self, gpu: Gpu, setup: Setup, assumed: Assumed, measured: dict[str, Any]) -> None:
        self.gpu, self.setup, self.assumed, self._measured = gpu, setup, assumed, measured

    def costs(self, load: Load, workers: int) -> Costs:
        handled = self._measured["handled"] * load.lengths.reply
        driver = self._measured["driver"]
        return costs_on(self.gpu, self.setup, self.assumed, load.lengths, workers, driver=driver, handled=handled)

    def parts(self, load: Load, workers: int) -> tuple[Part, ...]:
        return parts_of(load, self.costs(load, workers), workers)

    def chance(self, load: Load, workers: int, times: float = 1.0) -> Chance:
        """Return the random events: losses as often as the cards of a worker, or `times` as often."""
        start = self.costs(load, workers).start
        losses = times * LOSSES * self.setup.cards
        return Chance(**SPREAD, slow=SLOW, losses=losses, replace=start + DETECTED, restart=start + DETECTED)


def by_name(parts: Sequence[Part], workers: int, chance: Chance) -> dict[str, float]:
    """Return the seconds of the parts; those of the same name are added."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.name] = found.get(part.name, 0.0) + seconds_of(part, workers, chance)
    return found


def predict(machine: Machine, load: Load, gpus: int, prices: dict[str, float]) -> dict[str, Any] | None:
    """Return time and cost of a run on a number of GPUs; None if they are fewer than a worker needs."""
    workers = gpus // machine.setup.cards
    if not workers:
        return None
    parts, chance = machine.parts(load, workers), machine.chance(load, workers)
    seconds = by_name(parts, workers, chance)
    total = sum(seconds.values())
    return {
        "gpu": machine.gpu.name,
        "setup": machine.setup.name,
        "load": load.name,
        "gpus": gpus,
        "workers": workers,
        "parts": {name: round(value, 1) for name, value in seconds.items()},
        "seconds": round(total, 1),
        "without_chance": round(run_seconds(parts, workers), 1),
        "gpu_hours": round(gpus * total / 3600, 2),
        "cost": round(gpus * total / 3600 * prices[machine.gpu.name], 2),
        "alone": round(sum(part.seconds for part in parts if isinstance(part, Alone)) / total, 4),
    }


def predictions(measured: dict[str, Any], prices: dict[str, float]) -> list[dict[str, Any]]:
    """Return all predictions, with the efficiency against the smallest number of GPUs that runs."""
    rows = []
    for load in LOADS:
        for gpu in GPUS:
            for setup in SETUPS:
                machine = Machine(gpu, setup, Assumed(), measured)
                found = [row for size in SIZES if (row := predict(machine, load, size, prices))]
                for row in found:
                    row["efficiency"] = round(found[0]["gpu_hours"] / row["gpu_hours"], 4)
                rows += found
    return rows


def saturation(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each part, the number of GPUs (a power of two) from which half of its GPU time or more is idle."""
    rows = []
    for load in LOADS:
        for setup in SETUPS:
            machine = Machine(GPUS[-1], setup, Assumed(), measured)
            sizes = [size for size in POWERS if size >= setup.cards]
            rows.append({"load": load.name, "setup": setup.name, **_saturated(machine, load, sizes)})
    return rows


def _saturated(machine: Machine, load: Load, sizes: Sequence[int]) -> dict[str, Any]:
    cards = machine.setup.cards
    times = {}
    for size in sizes:
        workers = size // cards
        times[size] = by_name(machine.parts(load, workers), workers, machine.chance(load, workers))
    first = times[sizes[0]]

    def from_which(seconds: Callable[[int], float]) -> int | None:
        return next((size for size in sizes if seconds(sizes[0]) * sizes[0] < seconds(size) * size / 2), None)

    parts = {name: from_which(lambda size, name=name: times[size][name]) for name in first if first[name]}
    total = {size: sum(found.values()) for size, found in times.items()}
    return {
        "parts": parts,
        "run": from_which(lambda size: total[size]),
        "efficiency": {size: round(total[sizes[0]] * sizes[0] / (total[size] * size), 4) for size in sizes},
        "largest": {size: max(found, key=lambda name: found[name]) for size, found in times.items()},
    }


# -- other assumptions --------------------------------------------------------------------------------------------------


def _varied_assumptions() -> dict[str, Assumed]:
    usual = Assumed()
    return {
        "as assumed": usual,
        "0.2 of the peak FLOP/s": replace(usual, compute=0.2),
        "0.6 of the peak FLOP/s": replace(usual, compute=0.6),
        "0.3 of the memory bandwidth": replace(usual, memory=0.3),
        "launch 0.25 ms per layer": replace(usual, launch=2.5e-4),
        "launch 0.05 ms per layer (CUDA graphs)": replace(usual, launch=5e-5),
        "base read from shared storage, 10 GB/s in all": replace(usual, shared=10e9),
        "messages of gloo 0.5 ms": replace(usual, object_latency=5e-4),
        "messages of nccl 0.1 ms": replace(usual, latency=1e-4),
    }


def _larger(load: Load, **policy: int) -> Load:
    config = load.config
    return replace(load, config=config.model_copy(update={"policy": config.policy.model_copy(update=policy)}))


def variations(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the time of the large run at 7B on 64 and 512 H100 under other assumptions, and after changes to the package."""
    rows = []
    for name, assumed in _varied_assumptions().items():
        rows.append(_variation(name, Machine(GPUS[-1], SETUPS[0], assumed, measured), LARGE))
    usual = Machine(GPUS[-1], SETUPS[0], Assumed(), measured)
    rows.append(_variation("machine spread 0.3 in place of 0.05", usual, LARGE, machine_spread=0.3))
    rows.append(_variation("losses 100 times as often", usual, LARGE, times=100.0))
    rows.append(_variation("minibatches of 4,096 in place of 1,024 replies", usual, _larger(LARGE, minibatch=4096)))
    rows.append(_variation("no messages between workers cost time", _Free(usual), LARGE))
    rows.append(_variation("workers stay for all stages (one start)", usual, LARGE, leave_out="start", keep=1))
    return rows


class _Free(Machine):
    """A machine whose workers exchange messages in no time."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.gpu, machine.setup, machine.assumed, machine._measured)

    def costs(self, load: Load, workers: int) -> Costs:
        free = {"bandwidth": float("inf"), "latency": 0.0, "object_bandwidth": float("inf"), "object_latency": 0.0}
        return replace(super().costs(load, workers), **free, handled=0.0)


def _variation(
    name: str,
    machine: Machine,
    load: Load,
    *,
    machine_spread: float | None = None,
    times: float = 1.0,
    leave_out: str = "",
    keep: int = 0,
) -> dict[str, Any]:
    found: dict[str, Any] = {"change": name}
    for workers in (64, 512):
        chance = machine.chance(load, workers, times)
        chance = chance if machine_spread is None else replace(chance, machine=machine_spread)
        parts = machine.parts(load, workers)
        left = [part for part in parts if part.name == leave_out][keep:]
        # Divided by the number of workers, which is the best that can be reached.
        saved = sum(seconds_of(part, workers, chance) for part in left) * (1.0 if keep else 1 - 1 / workers)
        found[str(workers)] = round(run_seconds(parts, workers, chance) - saved, 1)
    return found


# -- checkpoints --------------------------------------------------------------------------------------------------------


def intervals(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the best intervals of checkpoints of the large policy training, and the cost of that in the settings."""
    rows = []
    for setup in SETUPS[:2]:
        machine = Machine(GPUS[-1], setup, Assumed(), measured)
        for workers in SIZES[1:]:
            for times in (1.0, 100.0):
                rows.append({"setup": setup.name, "workers": workers, "times": times, **_interval(machine, workers, times)})
    return rows


def _interval(machine: Machine, workers: int, times: float) -> dict[str, Any]:
    chance = machine.chance(LARGE, workers, times)
    part = next(part for part in machine.parts(LARGE, workers) if part.name == "policy")
    assert isinstance(part, Training)
    one, between = iteration_seconds(part, workers, chance), 1 / (chance.losses * workers)
    plain = part.iterations * one

    def overhead(every: int) -> float:
        return training_seconds(replace(part, every=every), workers, chance) / plain - 1

    best = min(range(1, part.iterations + 1), key=overhead)
    return {
        "iteration": round(one, 2),
        "checkpoint": round(part.checkpoint, 2),
        "hours_between_losses": round(between / 3600, 2),
        "young": round(young_interval(part.checkpoint, between) / one, 1),
        "daly": round(daly_interval(part.checkpoint, between) / one, 1),
        "best": best,
        "overhead_at_best": round(overhead(best), 5),
        "every": part.every,
        "overhead": round(overhead(part.every), 5),
    }


# -- the simulation -----------------------------------------------------------------------------------------------------

CHANCES = {
    "none": NONE,
    "spread": Chance(work=0.2, machine=0.1),
    "stragglers": Chance(work=0.2, machine=1.0),
    "stragglers, repeated": Chance(work=0.2, machine=1.0, slow=SLOW),
    "losses": Chance(work=0.2, machine=0.1, slow=SLOW, losses=1e-5, replace=60.0, restart=60.0),
}
"""Losses of 1e-5 per second are 1,900 times as often as those of `LOSSES`: otherwise there would be none to compare."""


def checks(seeds: int) -> list[dict[str, Any]]:
    """Compare the formula with the simulation, part by part."""
    rows = []
    for name, chance in CHANCES.items():
        for workers in SIZES:
            shards = Map("map", 3 * workers if workers > 1 else 8, 60.0, 0.01)
            training = Training("training", 24, (Phase(5.0, 0.1),) * 4, 5, 2.0)
            rows += [_checked(name, part, workers, chance, seeds) for part in (shards, training)]
            print(name, workers, [row["difference"] for row in rows[-2:]], flush=True)
    return rows


def _checked(name: str, part: Part, workers: int, chance: Chance, seeds: int) -> dict[str, Any]:
    # A simulation of few workers is short, and its result is spread more widely.
    count = 1 if chance is NONE else min(25 * seeds, seeds * max(1, 128 // workers))
    found = [simulate(part, workers, chance, seed) for seed in range(count)]
    return {"chance": name, "part": part.name, "workers": workers, **_difference(seconds_of(part, workers, chance), found)}


def _difference(expected: float, found: Sequence[float]) -> dict[str, Any]:
    """Return the formula, the mean of the simulations with its interval, and their relative difference."""
    figure = mean_figure(found, bounds=None)
    mean = statistics.fmean(found)
    return {
        "formula": round(expected, 3),
        "simulation": {name: None if value is None else round(value, 3) for name, value in figure.as_json().items()},
        "difference": round(expected / mean - 1, 5),
        "most": round(max(found), 3),
    }


def run_checks(measured: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """Compare the formula with the simulation of whole default runs at 7B on H100, with usual and with many accidents."""
    rows = []
    machine = Machine(GPUS[-1], SETUPS[0], Assumed(), measured)
    for workers in SIZES:
        usual = machine.chance(DEFAULT, workers)
        for name, chance in (("usual", usual), ("many", replace(usual, machine=0.3, losses=1000 * usual.losses))):
            parts = machine.parts(DEFAULT, workers)
            found = [simulate_run(parts, workers, chance, seed) for seed in range(seeds)]
            rows.append({"chance": name, "workers": workers, **_difference(run_seconds(parts, workers, chance), found)})
            print("run", name, workers, rows[-1]["difference"], flush=True)
    return rows


# -- the runs of this machine -------------------------------------------------------------------------------------------


def small_config() -> RunConfig:
    """Return the configuration of the measured runs."""
    recipe = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab" / "recipe.toml"
    return load_config(recipe, {}, [f"{name}={value}" for name, value in scale_runs.SETTINGS.items()])


def measure(work: Path) -> dict[str, Any]:
    """Measure the costs of this machine, and run on 1 and 2 workers."""
    costs = scale_costs.measure(small_config())
    runs = {str(workers): scale_runs.measure(work, workers) for workers in (1, 2)}
    one = runs["1"]["stages"]
    driver = statistics.fmean(one[name]["driver"] / one[name]["units"] for name in ("replies", "verdicts"))
    return {**costs.as_json(), "handled": costs.handled, "driver": round(driver, 5), "runs": runs}


def costs_here(measured: dict[str, Any]) -> Costs:
    """Return the costs of a worker on this machine. Messages on one machine cost the time to unpickle them only."""
    names = ("step", "row", "reading", "read", "learning", "learn", "optimizer", "start", "driver")
    known = {name: measured[name] for name in names}
    handled = measured["handled"] * lengths_here(measured).reply
    return Costs(**known, handled=handled, save=0.0, gradients=4.0 * measured["adapter"])


def lengths_here(measured: dict[str, Any]) -> Lengths:
    """Return the lengths of the texts: those of the prompts, and those of the run on one worker."""
    return Lengths(**{**measured["lengths"], **measured["runs"]["1"]["counts"]["lengths"]})


def load_here(measured: dict[str, Any]) -> Load:
    """Return the measured run. Its limit is the longest reply of a shard, which decides the number of decoding steps.

    The longest chain of thought is not recorded; it is taken to exceed the mean as the longest reply does.
    """
    counts, config, lengths = measured["runs"]["1"]["counts"], small_config(), lengths_here(measured)
    kept = counts["trained_pairs"] / (config.questions.train * (1 - config.evaluator.held_out))
    longest = {"replies": counts["longest_reply"], "verdicts": counts["longest_reply"] * lengths.reasoning / lengths.reply}
    changed = {
        name: getattr(config, name).model_copy(update={"max_new_tokens": math.ceil(limit)}) for name, limit in longest.items()
    }
    return Load("small", config.model_copy(update=changed), lengths, kept=(1.0, kept), reference=True)


def compared(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the CPU seconds of the busiest process of a stage with the formula, on 1 and 2 workers.

    `calibrated` is the formula for 2 workers times the ratio of measurement and formula on 1: an error of the costs cancels,
    and one of the scaling does not.
    """
    load, costs, rows = load_here(measured), costs_here(measured), []
    for name in ("replies", "verdicts", "evaluator", "policy"):
        found = {workers: run["stages"][name] for workers, run in measured["runs"].items()}
        expected = {w: _of_units(load, costs, name, int(w), stage["units"]) for w, stage in found.items()}
        calibrated = found["1"]["busiest"] / expected["1"] * expected["2"]
        rows.append(
            {
                "stage": name,
                "units": {w: stage["units"] for w, stage in found.items()},
                "measured": {w: stage["busiest"] for w, stage in found.items()},
                "formula": {w: round(value, 2) for w, value in expected.items()},
                "calibrated": round(calibrated, 2),
                "difference": round(calibrated / found["2"]["busiest"] - 1, 4),
            }
        )
    return rows


def _of_units(load: Load, costs: Costs, name: str, workers: int, units: int) -> float:
    """Return the expected time of some shards or iterations, of which the run has more."""
    part = next(part for part in parts_of(load, costs, workers) if part.name == name)
    if isinstance(part, Map):
        # The size of a shard is a setting of the measured runs.
        whole = next(part for part in parts_of(load, costs, 1) if part.name == name)
        assert isinstance(whole, Map)
        return seconds_of(replace(whole, shards=units), workers)
    assert isinstance(part, Training)
    return seconds_of(replace(part, iterations=units, every=units), workers)


# -- all figures --------------------------------------------------------------------------------------------------------


def earlier() -> dict[str, Any]:
    """Return the figures of an earlier call, or none."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def described() -> dict[str, Any]:
    """Return everything that was assumed or taken from a data sheet."""
    return {
        "assumed": asdict(Assumed()),
        "spread": SPREAD,
        "losses_per_hour": round(LOSSES * 3600, 9),
        "detected": DETECTED,
        "gpus": [asdict(gpu) for gpu in GPUS],
        "models": [{**asdict(m), "parameters": m.parameters, "adapter": m.adapter(Assumed().rank)} for m in MODELS],
        "loads": {load.name: {"lengths": asdict(load.lengths), "kept": load.kept} for load in LOADS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=PRICES["H100"], help="price of an H100 hour; an A100 is half of it")
    parser.add_argument("--seeds", type=int, default=8, help="simulations of each case; 0 keeps those of the last call")
    parser.add_argument("--measure", action="store_true", help="measure costs and runs again")
    parser.add_argument("--work", type=Path, default=Path("runs") / "scale-model", help="folder of the measured runs")
    asked = parser.parse_args()
    known = earlier()
    measured = measure(asked.work) if asked.measure or "measured" not in known else known["measured"]
    prices = {"A100": asked.price / 2, "H100": asked.price}
    figures = {
        **described(),
        "prices": prices,
        "measured": measured,
        "compared": compared(measured),
        "predicted": predictions(measured, prices),
        "saturation": saturation(measured),
        "variations": variations(measured),
        "intervals": intervals(measured),
        "checks": checks(asked.seeds) if asked.seeds else known["checks"],
        "run_checks": run_checks(measured, asked.seeds) if asked.seeds else known["run_checks"],
    }
    write(NAME, "python benchmarks/scale_model.py", figures)


if __name__ == "__main__":
    main()
