"""The command line. Commands import heavy libraries themselves to keep `selfeval --help` fast."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfeval import __version__
from selfeval.cli.benching import bench
from selfeval.cli.failures import clear_errors, end_signals, refuse_broken_arguments
from selfeval.cli.labelling import label
from selfeval.cli.libraries import quiet_libraries as _quiet_libraries
from selfeval.cli.places import RunFolder, for_reading, for_writing, place
from selfeval.cli.searching import search
from selfeval.cli.seeding import seeds
from selfeval.cli.serving import serve
from selfeval.cli.text_scoring import metrics
from selfeval.cli.tuning import check_source, config_and_source, say_tuned, with_vocabulary
from selfeval.cli.viewing import view
from selfeval.errors import InputError, StorageError
from selfeval.stages import STAGE_NAMES

if TYPE_CHECKING:
    from selfeval.config import RunConfig
    from selfeval.planner.memory_plan import Plan
    from selfeval.planner.stage_times import RunTime
    from selfeval.runs.export import Exported
    from selfeval.stages.terminal import Terminal

__all__ = ["app", "main"]

_HELP = """Train an evaluator and a better policy from a handful of seed questions and any open language model.

No human labels, one copy of the weights. Without arguments, `selfeval run` runs the whole loop on the small model that
comes with the package. Exit codes: 0 success, 1 internal error, 2 invalid input, 3 a check that recommends no run,
130 interrupted."""

app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
lab = typer.Typer(help="Pretrain or evaluate the embedded model.", no_args_is_help=True)
app.add_typer(lab, name="lab")
app.add_typer(bench, name="bench")
app.command()(serve)
app.command()(view)
app.command()(label)
app.command()(seeds)
app.command()(search)
app.command()(metrics)

_RESUMES = "Nothing is lost: rerun the same command to resume."
_NOTHING_CHANGED = "Nothing was changed; the same command starts from the beginning."
_PAGE_WHOLE = "index.html is intact, either the old or the new version; rerun the same command to rebuild it."
_NO_FOLDER = "No partial folder is left behind; the same command starts from the beginning."
_RESTORES = "Nothing is lost: rerun the same command to restore the rest."
"""Shown after Ctrl-C in `restore`."""

Recipe = Annotated[Path | None, typer.Argument(help="TOML recipe (default without --model: the recipe of the embedded model).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress; print only errors and the final table.")]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Execute custom code shipped with the model. Recipes and run folders cannot enable this."
    ),
]
CodeExecution = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Execute code in replies with the unit tests of a gold file, in a sandbox. Recipes and run folders cannot enable "
        "this.",
    ),
]
Sure = Annotated[
    float | None,
    typer.Option(
        min=0.5,
        max=1.0,
        help="Confidence threshold; below it the result is `unsure` (default: the threshold from `selfeval label`, or 0.8).",
    ),
]


@app.command()
def run(
    recipe: Recipe = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model folder or hub id.")] = None,
    seeds: Annotated[
        Path | None,
        typer.Option(help='Seed questions: JSON lines {"question": "..."}, or plain text with one question per line.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=place,
            help="Run folder, or a URL such as s3://bucket/runs/shop (default: runs/NAME); an existing run is resumed.",
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help=f"Stop after this stage: {', '.join(STAGE_NAMES)}. With several rounds, a stage of round 1; 2/pairs is a "
            "stage of round 2.",
        ),
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. policy.iterations=20.")
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit of this process, e.g. 2GiB. Batches shrink to fit; results are unaffected, except by an "
            "automatically selected precision.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Compute questions, replies, verdicts and the evaluation, and train, on N workers, each with its own copy of "
            "the model: on this machine, or on the cluster of --ray. Training depends on N in the last bits of sums, the rest "
            "does not.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Use the workers of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    trust_remote_code: RemoteCode = False,
    allow_code_execution: CodeExecution = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Rerun stages whose settings changed or whose files are missing, without asking.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Continue although the judge or the evaluator is not shown to be useful.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Append notes, progress, warnings of libraries and tracebacks to run.log in the run folder."
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the loop: questions, replies, verdicts, pairs, evaluator, policy, evaluation, report.

    The same command resumes an interrupted run. `selfeval run --output DIR` resumes the run
    in DIR with its own settings, except those overridden by --set. Results of other settings are moved to DIR/replaced only if
    you confirm, or with --restart; `selfeval restore DIR` restores them.

    With rounds above 1, the improved policy writes and answers the questions of the next round, in DIR/rounds/02 and so on. To
    extend a finished run, raise rounds. Examples:

    selfeval run

    selfeval run --model path/to/model --seeds my_seeds.jsonl --output runs/mine

    selfeval run --until pairs --set questions.train=200

    selfeval run --set rounds=3
    """
    with clear_errors(debug, interrupted=_RESUMES) as command, for_writing(output):
        from selfeval.stages.running import config_to_run

        # The folder is known only now; from here on, the log of a bug is written there.
        config = config_to_run(
            recipe,
            output,
            model=model,
            seeds=seeds,
            memory_budget=memory_budget,
            assignments=assign or [],
            trust_remote_code=trust_remote_code,
        )
        command.folder = output or Path("runs") / config.name
        _run(
            config,
            command.folder,
            until,
            quiet,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
            restart=restart,
            force=force,
            verbose=verbose,
            workers=workers,
            ray=ray,
        )


def _run(
    config: RunConfig,
    output: Path,
    until: str | None,
    quiet: bool,
    *,
    trust_remote_code: bool,
    allow_code_execution: bool,
    restart: bool,
    force: bool,
    verbose: bool,
    workers: int | None,
    ray: str | None,
) -> None:
    from selfeval.stages.running import execute, stop_at, workers_asked
    from selfeval.stages.terminal import Terminal

    stop = None if until is None else stop_at(until, config.rounds)
    _quiet_libraries()
    terminal = Terminal(quiet)
    asked = workers_asked(workers, ray)
    if workers is not None and ray is None:
        _check_memory(config, workers, terminal)
    done = execute(
        config,
        output,
        stop,
        terminal,
        trust_remote_code=trust_remote_code,
        allow_code_execution=allow_code_execution,
        restart=restart,
        force=force,
        workers=asked,
        verbose=verbose,
        watch=_watch(output) if terminal.is_live else "",
    )
    if not done.worked and not done.finished:
        typer.echo(f"{until or 'the loop'} is already finished in {output}; pass a later --until, or omit it, to continue")
    if done.reported:
        from selfeval.cli.closing import print_closing

        print_closing(output, done.worked or not done.finished)


def _check_memory(config: RunConfig, workers: int, terminal: Terminal) -> None:
    """Refuse more workers than fit the memory of this machine, unless the size of the model is not known."""
    from selfeval.planner.machine import Machine
    from selfeval.planner.model_configs import model_facts
    from selfeval.planner.planning import make_plan
    from selfeval.planner.workers import check_workers, is_far_below
    from selfeval.stages.preflight import check_base

    if not Path(config.model).is_dir():
        return
    check_base(config)
    facts, machine = model_facts(config.model), Machine.of(config.backbone)
    # A plan takes up to a minute; there is no need for one where everything fits many times.
    if is_far_below(facts, machine, workers):
        return
    with terminal.waiting(f"planning the memory of {workers} worker(s)"):
        check_workers(make_plan(config, facts, machine), workers)


def _watch(output: Path) -> str:
    """Return how to watch a run in a browser; nothing if the packages for it are not installed."""
    from selfeval.cli.server_options import has_server_packages

    return f"watch it: selfeval view {shlex.quote(str(output))}" if has_server_packages() else ""


@app.command()
def check(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub id (default: the embedded model with its seeds).")
    ] = None,
    seeds: Annotated[Path | None, typer.Argument(help="Seed questions, as for `selfeval run --seeds`.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time budget; the samples grow until it is spent.")] = 3.0,
    assign: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of the samples.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
    allow_code_execution: CodeExecution = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check in minutes whether a model can judge a domain, before a run of hours.

    The model writes questions and replies as in a run, and every judge judges them, in rounds that grow until the time is
    spent. Every judge is tested against chance. The check ends with a command to run, or with the reasons why the model is not
    shown to judge this domain and what would help (exit code 3). Ctrl-C ends the sampling, and the check reports what is known.

    Nothing is written without --output. Examples:

    selfeval check

    selfeval check path/to/model my_seeds.jsonl

    selfeval check path/to/model my_seeds.jsonl --minutes 10 --output check.json
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        from selfeval.cli.checking import check_file, finish, progress
        from selfeval.stages.preflight import check_texts
        from selfeval.stages.running import new_config

        check_file(output)
        seeded = [] if seed is None else [f"seed={seed}"]
        assignments = [*(assign or []), *seeded]
        config = new_config(
            model=model, seeds=seeds, assignments=assignments, check=check_texts, trust_remote_code=trust_remote_code
        )
        _quiet_libraries()
        from selfeval.stages.terminal import Terminal
        from selfeval.suitability.checking import check_model

        with progress(Terminal(quiet), minutes) as report_progress:
            found = check_model(
                config,
                minutes,
                report_progress=report_progress,
                trust_remote_code=trust_remote_code,
                allow_code_execution=allow_code_execution,
            )
        finish(found, model, seeds, assignments, output, as_json=as_json)


@app.command()
def plan(
    recipe: Recipe = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder, or the hub id of a common model; the model is not loaded.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds file, for --time.")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="config.json of any other model.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit per device, e.g. 6GiB (default: the free memory).")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="NAME=SIZE",
            help="Plan for this device instead of this machine's devices: cuda:N, cpu or disk. Repeatable.",
        ),
    ] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Also plan for N workers on this machine, as in `selfeval run`.")
    ] = None,
    with_time: Annotated[
        bool, typer.Option("--time", help="Also estimate the time of each stage: loads the model and measures its speed here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a run by device, phase and kind, and find settings that fit. The model is not loaded.

    Precision and device map are chosen as in a run, for this machine or for the devices given by --device. If the
    requested sizes do not fit, smaller ones are tried; if nothing fits, the output says what to change (exit code 2).

    Rows: runtime (Python, torch, libraries; RAM only), base (frozen weights), adapters, gradients and optimizer (of the roles
    being trained), KV cache (while sampling replies), activations, logits chunk, kernels (16-bit on a CPU), and memory retained
    by malloc (on a CPU, without a memory budget).

    With --time, the model is loaded, and a probe measures seconds per token on this machine: minutes per stage, from the
    numbers and limits of the settings and the length of a few replies to the seeds.

    Examples:

    selfeval plan

    selfeval plan --model path/to/model --seeds my_seeds.jsonl --time

    selfeval plan --model Qwen/Qwen2.5-7B-Instruct --device cuda:0=24GiB

    selfeval plan --model Qwen/Qwen2.5-7B-Instruct --device cuda:0=10GiB --device cuda:1=8GiB --device cpu=32GiB

    selfeval plan --config path/to/config.json --memory-budget 6GiB --set backbone.context.rope_scaling=yarn
    --set backbone.context.rope_factor=4
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        _refuse_time(with_time, config_file, devices)
        _plan(recipe, model, seeds, config_file, memory_budget, devices or [], assign or [], as_json, with_time, workers)


def _plan(
    recipe: Path | None,
    model: str | None,
    seeds: str | None,
    config_file: Path | None,
    budget: str | None,
    devices: list[str],
    assign: list[str],
    as_json: bool,
    with_time: bool,
    workers: int | None,
) -> None:
    from selfeval.stages.running import new_config

    named_model = model or (str(config_file) if config_file else None)
    named = _named_devices(devices)
    _quiet_libraries()
    from selfeval.planner.machine import Machine
    from selfeval.planner.model_configs import count_parameters, model_facts
    from selfeval.planner.planning import make_plan
    from selfeval.planner.workers import plan_workers
    from selfeval.stages.preflight import check_base

    config = new_config(
        recipe, model=named_model, seeds=seeds, memory_budget=budget, assignments=assign, count=count_parameters
    )
    facts = model_facts(str(config_file or config.model))
    with _steps("planning") as report_progress:
        if config_file is None and Path(config.model).is_dir():
            report_progress(f"checking {config.model}")
            check_base(config)
        made = make_plan(config, facts, Machine.of(config.backbone, named), report_progress=report_progress)
        times = _times(config, made, report_progress) if with_time and made.fits else None
    scaled = None if workers is None else plan_workers(made, workers)
    if as_json:
        import json

        timed = {} if times is None else {"time": times.as_json()}
        shared = {} if scaled is None else {"workers": scaled.as_json()}
        typer.echo(json.dumps(made.as_json() | timed | shared, indent=2))
    else:
        from selfeval.planner.table import print_plan, print_times

        print_plan(made)
        if times is not None:
            print_times(times)
        if scaled is not None:
            typer.echo(scaled.sentence)
    if not made.fits or (scaled is not None and not scaled.fits):
        raise typer.Exit(2)


def _refuse_time(with_time: bool, config_file: Path | None, devices: list[str] | None) -> None:
    """Refuse to measure the speed of another machine, or of a model without weights."""
    from selfeval.errors import ConfigError

    for given, option in ((config_file, "--config"), (devices, "--device")):
        if with_time and given:
            raise ConfigError(
                f"--time measures the model on this machine, and {option} plans for another one; pass one of them"
            )


def _times(config: RunConfig, plan: Plan, report_progress: Callable[[str], None]) -> RunTime:
    """Measure the speed with the settings that fit, and estimate the time of the stages."""
    from selfeval.planner.stage_times import estimate

    sizes = {name: plan.settings[name] for name in ("batch_tokens", "rollout_batch_size", "checkpointing")}
    return estimate(config.model_copy(update={"backbone": config.backbone.model_copy(update=sizes)}), report_progress)


@contextmanager
def _steps(title: str) -> Iterator[Callable[[str], None]]:
    """Show the current step on standard error: updated in place on a terminal, one line per step elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(f"{title}: {text}", highlight=False, markup=False, soft_wrap=True)
        return
    with console.status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")


def _named_devices(devices: list[str]) -> dict[str, int]:
    """Parse `--device` values; names and sizes are those of `backbone.placement.max_memory`."""
    from selfeval.config import PlacementConfig
    from selfeval.errors import ConfigError

    pairs = [text.partition("=") for text in devices]
    try:
        return dict(PlacementConfig.model_validate({"max_memory": {name: size for name, _, size in pairs}}).max_memory)
    except ValueError:
        raise ConfigError(
            f"--device {' --device '.join(devices)}: expected NAME=SIZE with cuda:0, cuda:1, ..., cpu or disk, for example "
            "--device cuda:0=24GiB --device cpu=64GiB"
        ) from None


@app.command()
def report(
    folder: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json: every figure with its n and interval.")] = False,
    debug: Debug = False,
) -> None:
    """Rebuild index.html from report.json and metrics/. Labels of people are read again from labels.jsonl.

    With --json, a run folder that cannot be written is only read.
    """
    with clear_errors(debug, interrupted=_PAGE_WHOLE), for_writing(None if as_json else folder):
        from selfeval.report.page import draw_page
        from selfeval.runs.label_report import update_labels
        from selfeval.runs.reader import RunReader
        from selfeval.texts import safe_json

        reader = RunReader(for_reading(folder))
        values = reader.report()
        # The page draws them without looking at hashes.
        reader.check([folder / "metrics"])
        try:
            if update_labels(folder):
                values = reader.report()
            page = draw_page(folder)
        except StorageError as error:
            if not as_json:
                raise
            typer.echo(f"Note: {error}", err=True)
        typer.echo(safe_json(values, indent=2) if as_json else f"Report: {page}")


@app.command()
def restore(
    folder: RunFolder,
    number: Annotated[
        int | None, typer.Argument(metavar="[N]", help="Results to restore: DIR/replaced/N. Without N, list them.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Restore results that another configuration replaced, together with their configuration. Current results are set aside.

    Without N, list the results that can be restored, with their cost and settings.
    """
    with clear_errors(debug, interrupted=_RESTORES), for_writing(folder):
        from selfeval.runs.reader import RunReader

        RunReader(folder)
        _quiet_libraries()
        from selfeval.stages.restore import listed
        from selfeval.stages.restore import restore as put_back
        from selfeval.store import RunStore
        from selfeval.texts import visible

        if number is None:
            typer.echo("\n".join(map(visible, listed(folder))) or f"nothing was replaced in {folder}")
            return
        store = RunStore(folder)
        try:
            stages = ", ".join(put_back(store, number))
        finally:
            store.close()
        typer.echo(f"restored: {stages}. To resume with their settings: selfeval run --output {folder}")


@app.command()
def show(
    folder: RunFolder,
    records: Annotated[
        str, typer.Argument(help="Kind of records: questions, replies, verdicts, pairs, scored, compared or dropped.")
    ] = "pairs",
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Number of records to show; for dropped records, the number per reason.")
    ] = 5,
    unusual: Annotated[
        bool,
        typer.Option("--unusual", help="Questions that are least like the others first, by perplexity under a model of these."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print complete records, one JSON object per line.")] = False,
    debug: Debug = False,
) -> None:
    """Show records of a run. Long lists of token ids are truncated, except with --json."""
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        from selfeval.cli.showing import first_rows, layout, unusual_rows
        from selfeval.runs.reader import RunReader
        from selfeval.texts import safe_json

        rows = unusual_rows if unusual else first_rows
        for row in rows(RunReader(for_reading(folder)), records, count):
            typer.echo(safe_json(row) if as_json else layout(row))


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder that contains run folders.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per run, with the intervals of all figures.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder and its subfolders: status, stage, model, last change and main figures, with 95% intervals.

    Runs in progress are listed too. A run that cannot be read has a line with the reason.
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        from selfeval.cli.listing import print_runs
        from selfeval.runs.listing import list_runs

        print_runs(list_runs(folder), folder, as_json=as_json)


@app.command()
def score(
    folder: RunFolder,
    question: Annotated[str | None, typer.Option(help="The question.")] = None,
    reply: Annotated[list[str] | None, typer.Option(help="A reply; repeat the option to compare replies.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"question": "...", "replies": ["...", "..."]}, or "messages" in place of "question" for a '
            "conversation; - reads from standard input."
        ),
    ] = None,
    sure: Sure = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per question.")] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="Batch size: lines of --file scored together. With 1, each line is answered immediately.")
    ] = 32,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Score replies with a run's evaluator and print the preferred reply with a confidence, or "unsure".

    With --file the model is loaded once, and results are printed in the order of the lines, as soon as each batch is scored.
    With --json a result contains all fields of its line, and scores, preferred (the number of a reply, from 0), confidence,
    unsure, and calibrated (whether the confidence was fitted on held-out pairs). Examples:

    selfeval score runs/mine --question "How many?" --reply "Two." --reply "Three."

    selfeval score runs/mine --file replies.jsonl --json > scores.jsonl
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        from selfeval.cli.scoring import print_scores, read_asked, typed
        from selfeval.runs.reader import RunReader

        RunReader(for_reading(folder))  # refuses a folder that is not a run before loading the libraries

        if (file is None) == (question is None or not reply):
            raise InputError("pass either --question and at least one --reply, or --file")
        asked = typed(question or "", reply or []) if file is None else read_asked(file)
        _quiet_libraries()
        from selfeval.runs.evaluator import Evaluator

        print_scores(Evaluator.load(folder, trust_remote_code=trust_remote_code), asked, sure, as_json=as_json, batch=batch)


@app.command()
def chat(
    folder: RunFolder,
    role: Annotated[str, typer.Option(help="Who replies: policy or base.")] = "policy",
    compare: Annotated[
        bool, typer.Option("--compare", help="Base and policy both reply, and the evaluator scores and compares the replies.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy (default: evaluation.temperature of the run).")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the sampling (default: evaluation.top_p of the run).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the replies.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Token limit of a reply (default: that of the run's replies).")
    ] = None,
    system: Annotated[str, typer.Option(help="System message, if the chat template has one.")] = "",
    sure: Sure = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per question.")] = False,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Chat with the policy of a run. Replies are printed while they are sampled.

    Ctrl-C ends a reply, Ctrl-D the chat. Commands: /save [FILE] appends the last question to a seeds file of JSON lines,
    /save-reply [FILE] the question with its reply; /retry, /undo, /reset, /help, /exit. If standard input is not a terminal,
    each of its lines is a question or a command. Examples:

    selfeval chat runs/mine

    selfeval chat runs/mine --compare --temperature 0.7

    selfeval chat runs/mine --json < questions.txt > replies.jsonl
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        from selfeval.runs.reader import RunReader

        RunReader(for_reading(folder))  # refuses a folder that is not a run before loading the libraries
        _quiet_libraries()
        from selfeval.cli.chatting import Settings
        from selfeval.cli.chatting import chat as chat_with

        settings = Settings(role, compare, temperature, top_p, seed, max_new_tokens, system, sure, as_json)
        chat_with(folder, settings, trust_remote_code=trust_remote_code)


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(metavar="OUT", help="Output folder; must be new or empty.")],
    role: Annotated[str, typer.Option(help="Trained role to export: policy or evaluator.")],
    merge: Annotated[bool, typer.Option("--merge", help="Export a complete model instead of an adapter.")] = False,
    precision: Annotated[
        str, typer.Option(help="Precision of the merged weights: base (as in the run), fp32, bf16 or fp16.")
    ] = "base",
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved since the run.")] = None,
    base_id: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Hub id of the base for the model card, if the run used a local copy."),
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a trained role as a folder that transformers, PEFT, TRL and reward-bench load.

    Without --merge: a PEFT adapter folder for the run's base; for an evaluator it includes the scalar head.

    With --merge: the policy as an ordinary language model, an evaluator as a sequence classifier with one label. The result is
    reloaded and compared with the role before the folder appears. This needs memory for two copies of the base, and no GPU.

    The folder also contains the tokenizer with a chat template that builds the run's prompts, the prompts themselves
    (templates/), a model card with figures and a snippet, and for an evaluator reward.py, a reward function for TRL. Examples:

    selfeval export runs/mine --role policy --merge --to exported/policy

    selfeval export runs/mine --role evaluator --merge --precision fp32 --to exported/evaluator
    """
    with clear_errors(debug, interrupted=_NO_FOLDER):
        from selfeval.runs.reader import RunReader

        config = RunReader(for_reading(folder)).config
        if model is not None:
            config = config.model_copy(update={"model": os.path.abspath(model) if Path(model).is_dir() else model})
        _quiet_libraries()
        from selfeval.config import nearest
        from selfeval.runs.export import MERGED_PRECISIONS, export_role
        from selfeval.stages.terminal import Terminal

        if precision not in MERGED_PRECISIONS:
            raise InputError(f'there is no precision "{precision}"{nearest(precision, list(MERGED_PRECISIONS))}')
        if precision != "base" and not merge:
            raise InputError("--precision applies to merged weights and needs --merge; adapters are always fp32")
        done = export_role(
            config,
            folder,
            role,
            to,
            merge=merge,
            precision=precision,
            waiting=Terminal(quiet).waiting,
            trust_remote_code=trust_remote_code,
            base_id=base_id,
        )
        _say_exported(done)


@app.command("export-log")
def export_log(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(metavar="LOGS", help="Folder of the logs; must be new or empty.")],
    debug: Debug = False,
) -> None:
    """Write the records of a run as logs of Inspect: the policy's replies, the evaluator's scores and the judge's verdicts.

    Needs the extra inspect: pip install 'self-evaluator[inspect]'. Example:

    selfeval export-log runs/mine --to logs/mine && inspect view --log-dir logs/mine
    """
    with clear_errors(debug, interrupted=_NO_FOLDER):
        from selfeval.runs.inspect_log import export_log
        from selfeval.runs.reader import RunReader

        for name, count in export_log(RunReader(for_reading(folder)), to).items():
            typer.echo(f"{to / name}.eval: {count} samples")


def _say_exported(done: Exported) -> None:
    typer.echo(f"{done.role} as {done.layout}: {done.folder}")
    if done.agreement is not None:
        seen = done.agreement
        typer.echo(
            f"verified: the reloaded {seen.compared} differ from the role's by at most {seen.difference:.2g} ({seen.precision})"
        )
    if "adapter" in done.layout and done.base.hub_id is None:
        typer.echo(
            "adapter_config.json refers to the base by a local path; before publishing, export again with --base-id ORG/NAME"
        )
    if done.tokenizers.own:
        typer.echo(
            "AutoTokenizer cannot load this tokenizer, which is not part of transformers; README.md shows how to load it"
        )


@app.command()
def tune(
    to: Annotated[Path, typer.Option(metavar="OUT", help="Output model folder; must be new or empty.")],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TEXT", help='Plain-text files, one document each, or .jsonl files with lines {"text": "..."}.'),
    ] = None,
    chat: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help='Conversations: JSON lines with "messages", or "prompt" and "completion". May be repeated.'
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=place, help="Run folder or URL: tune its model on the replies that its judge preferred."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face model folder or hub id; with --run, it is the run's model.")
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. tuning.steps=100.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per row (default: the model's full context length, including any extension; for conversations "
            "2,048, or the longest conversation).",
        ),
    ] = None,
    extend_vocabulary: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Learn up to N new tokens from TEXT... or --chat FILE, and train rows for them (default: 0).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder and the facts of the tuning as JSON.")] = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune an adapter on text, conversations or the preferred replies of a run, and write a complete model.

    Pass one of TEXT..., --chat FILE and --run DIR. On text every token is learned, for example to extend the context length. On
    conversations and replies, only what the assistant writes is learned, and a share of them is held out to measure the loss.

    The adapter is merged into the base. OUT is an ordinary model folder for `selfeval run --model OUT` and transformers; its
    config.json contains the requested RoPE scaling. Without RoPE scaling, the model is adapted to the domain of the data. The
    written model is reloaded on the CPU and compared with the adapter before OUT appears; this needs memory for two copies.

    The same command resumes an interrupted one; until OUT exists, the work is in OUT.tuning. Texts are packed one after the
    other into rows, each with the tokenizer's start token before it and the end token after it. Conversations are packed whole
    and do not see each other.

    --extend-vocabulary learns merges on top of the model's own BPE tokenizer, so words of the domain become single tokens.
    Embedding and output layer get a row for each, which is trained together with the adapter. Some text is held out;
    characters per token and loss per character on it are printed, before and after.

    --set accepts seed, templates, and the keys of the sections tuning and backbone (except
    backbone.rollout_batch_size); with --chat also those of chat. Examples:

    selfeval tune book.txt --model path/to/model --to models/longer --set backbone.context.rope_scaling=yarn
    --set backbone.context.rope_factor=4

    selfeval tune articles.jsonl --model path/to/model --to models/tuned --length 2048 --set tuning.steps=500

    selfeval tune --chat dialogues.jsonl --model path/to/model --to models/tuned --set tuning.learning_rate=2e-4

    selfeval tune --run runs/shop --to models/preferred

    selfeval tune manuals.txt --model path/to/model --to models/larger --extend-vocabulary 1000
    """
    with clear_errors(debug, interrupted=_RESUMES):
        check_source(texts, chat, run, model)
        if run is not None:
            for_reading(run)
        _quiet_libraries()
        from selfeval.stages.terminal import Terminal
        from selfeval.stages.tuning import tune as tune_model

        values = with_vocabulary(assign or [], extend_vocabulary)
        config, source = config_and_source(texts, chat, run, model, Path(os.path.abspath(to)).name, values)
        done = tune_model(config, source, to, length, Terminal(quiet), trust_remote_code=trust_remote_code)
        if as_json:
            from selfeval.texts import safe_json

            typer.echo(safe_json({"folder": str(done.exported.folder), **done.facts}, indent=2))
            return
        say_tuned(done.facts)
        _say_exported(done.exported)


@app.command("benchmark-judge")
def benchmark_judge(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", parser=place, help="Run folder or URL, to measure its judge, referee or evaluator."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="llmbar, pandalm, mtbench, rewardbench, judgebench or gsm8k-solutions, with --file; or a file of JSON lines "
            'with "question", "chosen", "rejected", or "question", "first", "second", "label".',
        ),
    ] = "",
    file: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="File or folder of a named data set; nothing is downloaded. May be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Measure a judge of this model: a folder or hub id.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With DIR: judge (default), referee or evaluator. With --model: a value of verdicts.judge, or referee.",
        ),
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. verdicts.reasoning=false.")
    ] = None,
    sure: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=1.0, help="Confidence from which a verdict counts (default: verdicts.keep; evaluator: as `score`)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of pairs, drawn at random (default: all).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; the same command resumes (default: nothing is kept).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a judge on pairs of replies with human labels, and compare it with trivial rules.

    Figures: agreement with the labels, share of pairs with a verdict at the chosen confidence, agreement on these, agreement of
    both orders, agreement at lower coverage, and the same by subset. Baselines on the same pairs: the longer reply, the first
    one, and the one with the higher mean log-probability. Examples:

    selfeval benchmark-judge runs/mine --data llmbar --file LLMBar/Dataset --limit 200

    selfeval benchmark-judge --model path/to/model --set verdicts.reasoning=false --data my_pairs.jsonl --output benchmarks/mine
    """
    with clear_errors(debug, interrupted=_RESUMES if output else _NOTHING_CHANGED):
        if not data:
            raise InputError("pass the labelled pairs as --data NAME with --file PATH, or as --data FILE")
        _quiet_libraries()
        from selfeval.cli.judge_figures import print_benchmark
        from selfeval.judge_benchmark.benchmark import benchmark_judge as measure_judge
        from selfeval.texts import safe_json

        result = measure_judge(
            data,
            run=None if folder is None else for_reading(folder),
            model=model,
            judge=judge,
            files=file or (),
            settings=assign or (),
            sure=sure,
            limit=limit,
            seed=seed,
            output=output,
            progress=not quiet,
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            typer.echo(safe_json(result.as_json(), indent=2))
        else:
            print_benchmark(result)


@app.command("judge-check")
def judge_check(
    folder: RunFolder,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines with "question", "first", "second" and "label": first, second or tie; or labels.jsonl of the run.',
        ),
    ] = None,
    error: Annotated[float, typer.Option(help="Wanted error rate of kept verdicts.")] = 0.1,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write pairs of the run to a new file to label, without verdicts.")
    ] = None,
    count: Annotated[int, typer.Option("--n", min=1, help="Number of pairs to write.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pairs to write.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the judge of a run with human labels, and find the confidence threshold for a wanted error rate.

    Figures: agreement, Cohen's kappa, order and length bias, calibration, risk and coverage. The threshold holds for pairs that
    are drawn as the labelled ones, except with a probability of 5%, for any judge and any distribution. Examples:

    selfeval judge-check runs/mine --write to_label.jsonl --n 200

    selfeval judge-check runs/mine --labels to_label.jsonl --error 0.1
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        if (labels is None) == (write is None):
            raise InputError("pass either --labels FILE, the labels, or --write FILE, to write pairs to label")
        for_reading(folder)
        _quiet_libraries()
        from selfeval.cli.judge_figures import print_check
        from selfeval.judge_benchmark.label_check import judge_check as check_judge
        from selfeval.judge_benchmark.label_check import write_unlabelled
        from selfeval.texts import safe_json

        if write is not None:
            written = write_unlabelled(folder, write, count, seed)
            typer.echo(f"wrote {written} pairs to {write}; set each label to first, second or tie, and pass it as --labels")
        if labels is not None:
            found = check_judge(folder, labels, error=error, progress=not quiet, trust_remote_code=trust_remote_code)
            if as_json:
                typer.echo(safe_json(found.as_json(), indent=2))
            else:
                print_check(found)


@app.command()
def compare(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Two or more: run folders or URLs, RUN@base for the base model of a run, or files of JSON lines with "
            '"question" and "reply".',
        ),
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="referee (default), judge, evaluator or gold. May be repeated: the first one ranks, and their agreement is "
            "measured.",
        ),
    ] = None,
    judge_run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", parser=place, help="Run whose judges and gold are used (default: the first run)."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Questions: JSON lines, or plain text (default: the common test questions of the runs)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of questions (default: all).")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of comparison.json, index.html, replies and judgements; the same command resumes (default: nothing is "
            "kept)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
    allow_code_execution: CodeExecution = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the policies of several runs on the same test questions, with ranks and intervals.

    Figures: win rate of every pair (ties count one half), the same at equal length, Bradley-Terry strengths and ranks,
    correctness by gold, and how many questions would show a difference that is not clear. Examples:

    selfeval compare runs/first runs/second runs/first@base

    selfeval compare runs/first other_model.jsonl --judge referee --judge gold --output comparisons/other
    """
    with clear_errors(debug, interrupted=_RESUMES if output else _NOTHING_CHANGED):
        _quiet_libraries()
        from selfeval.cli.comparing import print_comparison
        from selfeval.policy_comparison.comparing import compare as compare_policies
        from selfeval.texts import safe_json

        result = compare_policies(
            policies,
            judges=judge or ("referee",),
            judge_run=None if judge_run is None else for_reading(judge_run),
            questions=questions,
            limit=limit,
            output=output,
            progress=not quiet,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
        )
        if as_json:
            typer.echo(safe_json(result.as_json(), indent=2))
        else:
            print_comparison(result, output)


@lab.command()
def pretrain(
    output: Annotated[Path, typer.Option(help="Output model folder.")] = Path("pretrained"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 24_000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the weights and the training text.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses torch's default.")] = 0,
    debug: Debug = False,
) -> None:
    """Pretrain the embedded model from scratch. The same command resumes from the last checkpoint."""
    with clear_errors(debug, interrupted=_RESUMES):
        _quiet_libraries()
        import torch

        from selfeval.lab.pretrain import PretrainConfig
        from selfeval.lab.pretrain import pretrain as train

        if threads:
            torch.set_num_threads(threads)
        train(output, PretrainConfig(seed=seed, steps=steps), typer.echo)


@lab.command()
def exam(
    model: Annotated[str, typer.Argument(help="Model folder (default: the embedded model).")] = "",
    questions: Annotated[int, typer.Option(min=10, help="Number of problems per skill.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the problems and samples.")] = 1,
    debug: Debug = False,
) -> None:
    """Evaluate the embedded model's skills against gold answers: replying, asking, judging in both orders, marking."""
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        _quiet_libraries()
        import json

        from selfeval.lab.exam import examine

        embedded = str(Path(__file__).parents[1] / "lab" / "word_problems")
        typer.echo(json.dumps(examine(model or embedded, questions, seed), indent=2))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def main(handler: Callable[..., None] = _interrupt) -> None:
    """Run the command line. SIGTERM and SIGHUP are handled like Ctrl-C."""
    # A scheduler ends jobs with SIGTERM, a closed terminal with SIGHUP; as an exception they run the same clean-up as Ctrl-C.
    for number in end_signals():
        signal.signal(number, handler)
    # Before transformers and huggingface_hub are imported, which read theirs on import.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    refuse_broken_arguments(sys.argv[1:])
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
