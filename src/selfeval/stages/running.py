"""Run the loop: the code shared by the command `selfeval run` and the function `selfeval.run`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfeval.config import RunConfig, load_config, nearest
from selfeval.errors import ConfigError, InputError, RunFolderError
from selfeval.runs.model_defaults import model_defaults
from selfeval.runs.reader import RunReader
from selfeval.runs.run import Run
from selfeval.runs.servers import is_named_by, named_servers, refuse_servers
from selfeval.stages import STAGE_NAMES
from selfeval.store import Fresh, Ledger
from selfeval.store.remote.places import is_url

if TYPE_CHECKING:
    from selfeval.stages.context import Context, Trainer
    from selfeval.stages.shards import Executor
    from selfeval.stages.terminal import Terminal
    from selfeval.stages.workers import Workers, WorkersAsked
    from selfeval.store import RunStore

__all__ = ["Outcome", "assignments_of", "config_to_run", "execute", "new_config", "run", "stop_at", "workers_asked"]

_WEIGHTS_FOLDER = "backbone.placement.folder"
_EMBEDDED = Path(__file__).parents[1] / "lab" / "recipe.toml"


@dataclass(frozen=True)
class Outcome:
    """The state of a run after the loop was run.

    Attributes:
        worked: whether any stage had work to do.
        finished: whether every stage of every round is finished.
        reported: whether there is an up-to-date report.
    """

    worked: bool
    finished: bool
    reported: bool


# -- configuration ------------------------------------------------------------------------------------------------------


def new_config(
    recipe: str | Path | None = None,
    *,
    model: str | None = None,
    seeds: str | Path | None = None,
    name: str | None = None,
    memory_budget: str | int | None = None,
    assignments: Sequence[str] = (),
    count: Callable[[str], int] | None = None,
    wanted: Callable[[str], bool] = lambda key: True,
    trust_remote_code: bool = False,
    check: Callable[[RunConfig], object] = lambda config: None,
) -> RunConfig:
    """Return the configuration of a new run. Default: the embedded model's, if neither recipe nor model is given.

    Settings that are not given depend on the size and the chat template of the model (docs/configuration.md). Seeds with
    passages are also the file of questions, unless another file is set.

    Args:
        recipe: Optional. Path of a TOML file.
        model: Optional. Model folder or hub id.
        seeds: Optional. Path of the seeds file.
        name: Optional. Name of the run.
        memory_budget: Optional. Memory that the process may use, such as `2GiB`.
        assignments: `key=value` strings that override everything else.
        count: Optional. Returns the number of parameters of a model that is not a folder; see `model_defaults`.
        wanted: Optional. Returns whether a setting may take its default from the model. Default: all may.
        trust_remote_code: run code that comes with the model, to know its size. Default: False.
        check: Optional. Called with the configuration before a model that is not a folder is looked up, which may take long.

    Raises:
        ConfigError: a key or a value is wrong.
        SeedsError: some seeds have a passage, and others have none.
    """
    # The embedded recipe is for runs without a model; a model without a recipe takes the defaults.
    picked = Path(recipe) if recipe else None if model else _EMBEDDED
    # Absolute, because run.json records it and the run may be resumed from another working directory.
    found = os.path.abspath(model) if model and Path(model).is_dir() else model
    given_seeds = None if seeds is None else os.path.abspath(seeds)
    overrides = {"model": found, "seeds": given_seeds, "name": name, "backbone.memory_budget": memory_budget}
    config = load_config(picked, overrides, assignments)
    if _asks_the_seeds(config):
        overrides["questions.file"] = config.seeds
        config = load_config(picked, overrides, assignments)
    if not Path(config.model).is_dir():
        check(config)
    made = model_defaults(config.model, count, trust_remote_code=trust_remote_code)
    if made is None:
        return config
    # Whoever limits the thinking wants it.
    thinks = config.replies.max_thinking_tokens is not None
    values = {key: value for key, value in made.values.items() if wanted(key) and not (thinks and key == "chat.arguments")}
    return load_config(picked, overrides, assignments, values)


def _asks_the_seeds(config: RunConfig) -> bool:
    """Return whether the seeds have passages, so that the run asks them as they are: generated questions would have none."""
    has_file = config.questions.file or config.replies.file or config.pairs.file
    if not config.seeds or has_file:
        return False
    from selfeval.stages.seeds import has_passages

    return has_passages(config.seeds)


def config_to_run(
    recipe: str | Path | None,
    output: Path | None,
    *,
    model: str | None = None,
    seeds: str | Path | None = None,
    memory_budget: str | int | None = None,
    assignments: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> RunConfig:
    """Return the configuration to run: that of the run in `output` unless recipe, model or seeds are given, else a new one.

    Args:
        recipe: see `new_config`.
        output: Optional. Run folder; its last part names a new run that has no recipe.
        model: see `new_config`.
        seeds: see `new_config`.
        memory_budget: see `new_config`.
        assignments: see `new_config`.
        trust_remote_code: see `new_config`.

    Raises:
        InputError: a key or a value is wrong, or seeds or questions for a hub id cannot be used.
        RunFolderError: the run in `output` cannot be read.
    """
    from selfeval.stages.preflight import check_texts

    if output and (output / "run.json").exists() and not (recipe or model or seeds):
        return _config_of_the_run(output, memory_budget, assignments)
    name = Path(os.path.abspath(output)).name if output and not recipe else None
    return new_config(
        recipe,
        model=model,
        seeds=seeds,
        name=name,
        memory_budget=memory_budget,
        assignments=assignments,
        trust_remote_code=trust_remote_code,
        check=check_texts,
    )


def _config_of_the_run(folder: Path, memory_budget: str | int | None, assignments: Sequence[str]) -> RunConfig:
    """Return the configuration that a run.json recorded. It may come from somebody else, so it is not obeyed in everything.

    Raises:
        RunFolderError: it names a file to read, a folder to write to, a tracker or a server, which only the command may name.
    """
    from selfeval.stages.input_files import refuse_other_files  # reads templates with transformers

    reader = RunReader(folder)
    values = {**reader.config.model_dump(mode="json"), "backbone.memory_budget": memory_budget}
    if not Path(values["seeds"]).exists() and (folder / "seeds.jsonl").is_file():
        values["seeds"] = str((folder / "seeds.jsonl").resolve())  # the run folder has a copy
    is_named = is_named_by(assignments)
    placement = values["backbone"]["placement"]
    recorded = placement["folder"]
    placement["folder"] = ""
    config = load_config(None, values, assignments)
    if recorded and not is_named(_WEIGHTS_FOLDER) and not config.backbone.placement.folder:
        config = load_config(None, values, [*assignments, f"{_WEIGHTS_FOLDER}={json.dumps(_inside(folder, recorded))}"])
    refuse_other_files(folder, reader.run.get("made_of") or {}, config, is_named)
    if not is_named("trackers"):
        _refuse_remote(folder, config.trackers)
    refuse_servers(folder, config.all_servers, is_named)
    return config


def _refuse_remote(run: Path, trackers: Sequence[str]) -> None:
    """Refuse the trackers of a run.json, except TensorBoard, which writes into the run folder.

    Raises:
        RunFolderError: there is another one, which may send the run to a server.
    """
    if set(trackers) - {"tensorboard"}:
        asked, none = (shlex.quote(f"trackers={json.dumps(names)}") for names in (list(trackers), []))
        raise RunFolderError(
            f"{run / 'run.json'} sets trackers = {', '.join(trackers)}, which may send the run to a server; a resumed run does "
            f"so only if the command says so: add --set {asked}, or --set {none} for none"
        )


def _inside(run: Path, recorded: str) -> str:
    """Return the folder for weights that a run.json names, if it is part of the run.

    Raises:
        RunFolderError: it is elsewhere. A run folder may come from an untrusted source, so only this command's own options
            choose a place outside of it that is written to.
    """
    if not Path(recorded).resolve().is_relative_to(run.resolve()):
        option = f"--set {_WEIGHTS_FOLDER}"
        raise RunFolderError(
            f"{run / 'run.json'} sets {_WEIGHTS_FOLDER} = {recorded}, which is outside of the run folder; a resumed run writes "
            f'there only if the command says so: add {option}={recorded}, or {option}="" for a temporary folder'
        )
    return recorded


def stop_at(until: str, rounds: int) -> tuple[int, str]:
    """Return the round and the stage that `until` names: `pairs`, or `2/pairs` for one of round 2.

    Raises:
        InputError: there is no such stage or round.
    """
    number, _, stage = until.rpartition("/")
    if stage not in STAGE_NAMES:
        raise InputError(f'there is no stage "{stage}"{nearest(stage, STAGE_NAMES)}')
    if number and not (number.isdecimal() and 1 <= int(number) <= rounds):
        raise InputError(
            f'--until {until}: there is no round "{number}", rounds = {rounds}; pass an existing round, or raise rounds with '
            "--set rounds=N"
        )
    return int(number or 1), stage


# -- running ------------------------------------------------------------------------------------------------------------


def execute(
    config: RunConfig,
    output: Path,
    stop: tuple[int, str] | None,
    terminal: Terminal,
    *,
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
    restart: bool = False,
    force: bool = False,
    executor_of: Callable[[Context], Executor] | None = None,
    workers: WorkersAsked | None = None,
    trainer: Trainer | None = None,
    verbose: bool = False,
    watch: str = "",
) -> Outcome:
    """Check the input, then run every unfinished stage.

    Args:
        config: configuration of the run.
        output: run folder; an existing run is resumed.
        stop: Optional. Round and stage after which to stop. Default: the last of all.
        terminal: shows progress, and asks whether finished work may be set aside.
        trust_remote_code: run code that comes with the model. Default: False.
        allow_code_execution: run code in replies with the unit tests of a gold file, in a sandbox. Default: False.
        restart: rerun stages whose settings changed or whose files are lost, without asking. Default: False.
        force: continue although the judge or the evaluator is not shown to be useful. Default: False.
        executor_of: Optional. Returns the executor of a stage that writes shards, from the context of its round. Default:
            shards are computed in this process.
        workers: Optional. Workers that compute shards and train together, by Ray. Default: none.
        trainer: Optional. Calls the training of a stage. Default: the workers, or this process if there are none.
        verbose: append notes, progress, warnings of libraries and tracebacks to `run.log` in the run folder. Default: False.
        watch: Optional. Line for the terminal that says how to watch the run. Default: none.

    Raises:
        InputError: an input cannot be used; a new run folder is removed again.
    """
    from selfeval.stages.preflight import check_input, run_folder

    check_input(config, trust_remote_code=trust_remote_code, allow_code_execution=allow_code_execution)
    from selfeval.backbone.snapshot import ensure_snapshot
    from selfeval.stages.context import Context, in_process, in_this_process
    from selfeval.stages.progress import progress_file
    from selfeval.stages.rounds import run_rounds
    from selfeval.stages.run_log import run_log

    if not Path(config.model).is_dir():
        with terminal.waiting(f"downloading missing files of {config.model}"):
            ensure_snapshot(config.model)  # the hashes of its files are part of the stages' keys
    if not (output / "run.json").exists():
        made = model_defaults(config.model, trust_remote_code=trust_remote_code)
        unknown = f"the size of {config.model} is not known, so settings that were not given have the defaults of small models"
        if note := unknown if made is None else made.note(config):
            terminal.note(note)
    for section, settings in config.all_servers.items():
        terminal.note(f"{section}: questions and replies are sent to {settings.model} at {settings.url}")
    with (
        run_folder(output) as store,
        progress_file(output, terminal),
        run_log(output) if verbose else nullcontext() as log,
        _workers(workers, config, store, terminal) as found,
    ):
        if watch:
            terminal.show(watch)
        if log:
            terminal.note(f"log: {log}")
        context = Context(
            config,
            store,
            terminal,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
            restart=restart,
            force=force,
            executor_of=executor_of or in_process,
            workers=found,
            trainer=trainer or (in_this_process if found is None else found.train),
        )
        worked = run_rounds(context, stop)
        return Outcome(worked, store.run["status"] == "finished", isinstance(Ledger(store.root).state("report"), Fresh))


def workers_asked(number: int | None, ray: str | None) -> WorkersAsked | None:
    """Return the workers that the user asks for; None without `--workers` and `--ray`.

    Raises:
        ConfigError: fewer than one.
    """
    if number is None and ray is None:
        return None
    if number is not None and number < 1:
        raise ConfigError(f"workers = {number}; use a whole number of at least 1")
    from selfeval.stages.workers import WorkersAsked

    return WorkersAsked(number, ray)


def _workers(
    asked: WorkersAsked | None, config: RunConfig, store: RunStore, terminal: Terminal
) -> AbstractContextManager[Workers | None]:
    if asked is None:
        return nullcontext()
    from selfeval.stages.workers import open_workers  # most runs need no worker

    return open_workers(asked, config, store, terminal)


def run(
    recipe: RunConfig | str | Path | None = None,
    *,
    output: str | Path | None = None,
    until: str | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    **settings: Any,
) -> Run:
    """Run the loop, or resume it, as `selfeval run` does: questions, replies, verdicts, pairs, evaluator, policy, evaluation.

    Without a recipe and without `model`, the embedded model is used. With `output` alone, the run in that folder is resumed
    with its own settings. This function never reads standard input.

    Args:
        recipe: Optional. A configuration (see `load_config`), or the path of a TOML recipe.
        output: Optional. Run folder or URL (default: `runs/NAME`). An existing run is resumed.
        until: Optional. Stop after this stage; `2/pairs` is a stage of round 2. Default: run all stages.
        restart: rerun stages whose settings changed or whose files are lost; their old results are moved to `replaced/`.
            Default: False.
        force: continue although the judge or the evaluator is not shown to be useful. Default: False, which raises a
            `LoopError` with the figures.
        progress: write progress to standard error. Default: True.
        trust_remote_code: run code that comes with the model. No setting can enable this. Default: False.
        allow_code_execution: run code in replies with the unit tests of a gold file, in a sandbox. No setting can enable this.
            Default: False.
        workers: Optional. Number of processes that compute shards and train together, each with its own copy of the model.
            They are started by Ray on this machine, or on the cluster `ray`. Default: this process does all work.
        ray: Optional. Address of a Ray cluster: `auto`, `HOST:PORT` or `ray://HOST:PORT`. Default: none.
        **settings: configuration values that override the recipe, such as `model`, `seeds`, `seed`; sections are dicts,
            such as `policy={"iterations": 4}`.

    Returns:
        The run, opened for reading.

    Raises:
        InputError: an input cannot be used, or finished work would be replaced and `restart` is False.

    Example:
        >>> run(output="runs/first", progress=False).status  # a finished run: nothing is left to do
        'finished'
    """
    if output is not None and is_url(output):
        from selfeval.store.remote.mirror import opened  # imports fsspec

        home: AbstractContextManager[Path | None] = opened(output)
    else:
        home = nullcontext(None if output is None else Path(output))
    with home as folder:
        return _run_in(
            recipe,
            folder,
            until,
            settings,
            restart=restart,
            force=force,
            progress=progress,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
            workers=workers_asked(workers, ray),
        )


def _run_in(
    recipe: RunConfig | str | Path | None,
    folder: Path | None,
    until: str | None,
    settings: dict[str, Any],
    *,
    restart: bool,
    force: bool,
    progress: bool,
    trust_remote_code: bool,
    allow_code_execution: bool,
    workers: WorkersAsked | None,
) -> Run:
    """Run the loop in a local folder; see `run`."""
    if isinstance(recipe, RunConfig):
        # Through JSON and back, so overrides are validated together with the values that they change.
        config = load_config(None, recipe.model_dump(mode="json"), [*assignments_of(settings)])
    else:
        # These two decide whether `output` is resumed with its own settings or starts from others.
        named = {key: settings.pop(key) for key in ("model", "seeds") if settings.get(key) is not None}
        assignments = [*assignments_of(settings)]
        config = config_to_run(recipe, folder, **named, assignments=assignments, trust_remote_code=trust_remote_code)
    folder = folder or Path("runs") / config.name
    stop = None if until is None else stop_at(until, config.rounds)
    from selfeval.stages.terminal import Terminal

    terminal = Terminal(quiet=not progress, asks=False)
    execute(
        config,
        folder,
        stop,
        terminal,
        trust_remote_code=trust_remote_code,
        allow_code_execution=allow_code_execution,
        restart=restart,
        force=force,
        workers=workers,
    )
    # The caller of this function named them.
    return Run.open(folder, trust_remote_code=trust_remote_code, servers=named_servers(config))


def assignments_of(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield settings in the form of `--set`, one per dotted key, so that messages can name the argument.

    Example:
        >>> list(assignments_of({"seed": 3, "policy": {"learner": "dpo", "iterations": 4}, "domain": None}))
        ['seed=3', 'policy.learner="dpo"', 'policy.iterations=4', 'domain=none']
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from assignments_of(value, f"{prefix}{key}.")
        else:
            # JSON strings, numbers, booleans and lists are valid TOML.
            yield f"{prefix}{key}={'none' if value is None else json.dumps(value, ensure_ascii=False, default=str)}"
