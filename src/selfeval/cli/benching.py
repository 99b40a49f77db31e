"""`selfeval bench`: the speed and memory of this package on a machine and a model, against Hugging Face and a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.libraries import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from selfeval.bench.memory import MemoryResult
    from selfeval.bench.timing import Comparison, SideTimes
    from selfeval.bench.workloads import BenchOptions, BenchResult

__all__ = ["bench", "print_memory", "print_times"]

bench = typer.Typer(
    help="Measure speed and memory on this machine and your model, against Hugging Face and a physical limit.",
    no_args_is_help=True,
)

_NOTHING_CHANGED = "Nothing was changed; the same command starts from the beginning."
_SIDES = {"ours": "ours", "separate": "ours", "hugging_face": "Hugging Face", "limit": "limit"}

Model = Annotated[str | None, typer.Option(help="Model folder or hub id (default: the embedded model).")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16; the same on all sides.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes as many as a run would.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which the sides take turns; a warm-up round is not counted.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Replies per prompt (default: 8, or all if there are fewer requests).")
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt, on average.")]
ReplyTokens = Annotated[int, typer.Option(min=1, help="Tokens of a reply, on average.")]
BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, help="Batch size of Hugging Face; may be repeated, the fastest counts."),
]
Learner = Annotated[str, typer.Option(help="ppo, grpo or rloo.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Execute custom code shipped with the model.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")]


@bench.command()
def rollout(
    model: Model = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of replies.")] = 256,
    samples: Samples = None,
    prompt_tokens: PromptTokens = 64,
    reply_tokens: ReplyTokens = 64,
    batch_size: BatchSizes = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure sampling: our engine, `generate` of transformers with the same adapter, and plain passes over the same tokens.

    Every reply has its own forced length, spread as those of replies that end by themselves. Default batch sizes of Hugging
    Face: 32, 64, 128 and 256. Examples:

    selfeval bench rollout

    selfeval bench rollout --model path/to/model --requests 64 --reply-tokens 128 --json
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        options = _options(model, device, precision, threads, rounds, trust_remote_code)
        from selfeval.bench.rollout import BATCH_SIZES, bench_rollout

        with _progress("bench rollout", quiet) as report_progress:
            found = bench_rollout(
                options,
                requests=requests,
                samples=samples,
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                batch_sizes=batch_size or BATCH_SIZES,
                report_progress=report_progress,
            )
        _say(found, as_json)


@bench.command()
def step(
    model: Model = None,
    learner: Learner = "ppo",
    requests: Annotated[int, typer.Option(min=2, help="Number of replies of an iteration.")] = 128,
    samples: Samples = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each reply.")] = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure an iteration of policy learning: prompts read once for all replies, prompts read with each, and plain passes.

    In each round every side runs two iterations, of which the second counts. Examples:

    selfeval bench step

    selfeval bench step --model path/to/model --learner grpo --requests 32
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        options = _options(model, device, precision, threads, rounds, trust_remote_code)
        from selfeval.bench.step import bench_step

        with _progress("bench step", quiet) as report_progress:
            found = bench_step(
                options,
                learner=learner,
                requests=requests,
                samples=samples,
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                report_progress=report_progress,
            )
        _say(found, as_json)


@bench.command()
def judge(
    model: Model = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question, on average.")] = 32,
    reply_tokens: ReplyTokens = 64,
    batch_size: BatchSizes = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure verdicts on pairs in both orders, without a chain of thought, and scores of an evaluator.

    Hugging Face reads the same label probabilities by forward passes or by generating one token, and scores with a sequence
    classifier. Default batch sizes of Hugging Face: 32 and 64. Examples:

    selfeval bench judge

    selfeval bench judge --model path/to/model --requests 64
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        options = _options(model, device, precision, threads, rounds, trust_remote_code)
        from selfeval.bench.judge import BATCH_SIZES, bench_judge

        with _progress("bench judge", quiet) as report_progress:
            found = bench_judge(
                options,
                requests=requests,
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                batch_sizes=batch_size or BATCH_SIZES,
                report_progress=report_progress,
            )
        _say(found, as_json)


@bench.command()
def logprobs(
    model: Model = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of replies.")] = 256,
    samples: Samples = None,
    prompt_tokens: PromptTokens = 64,
    reply_tokens: ReplyTokens = 64,
    batch_size: BatchSizes = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the log-probs of given replies: ours, all logits of transformers with the same adapter, and plain passes.

    Default batch sizes of Hugging Face: 32 and 64. The largest difference between the log-probs is printed. Examples:

    selfeval bench logprobs

    selfeval bench logprobs --model path/to/model --requests 64 --samples 4
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        options = _options(model, device, precision, threads, rounds, trust_remote_code)
        from selfeval.bench.logprobs import BATCH_SIZES, bench_logprobs

        with _progress("bench logprobs", quiet) as report_progress:
            found = bench_logprobs(
                options,
                requests=requests,
                samples=samples,
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                batch_sizes=batch_size or BATCH_SIZES,
                report_progress=report_progress,
            )
        _say(found, as_json)


@bench.command()
def memory(
    model: Model = None,
    learner: Learner = "ppo",
    requests: Annotated[int, typer.Option(min=2, help="Number of replies of an iteration.")] = 64,
    samples: Samples = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each reply.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of Hugging Face.")] = 32,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = 0,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure peak memory of sampling, scoring and updating in new processes, and compare it with `selfeval plan`.

    Hugging Face's sampling and scoring are measured. Its update is computed: our peak, and further copies of the weights for
    reference, evaluator and, with PPO, critic. Examples:

    selfeval bench memory

    selfeval bench memory --model path/to/model --learner rloo --requests 16
    """
    with clear_errors(debug, interrupted=_NOTHING_CHANGED):
        options = _options(model, device, precision, threads, 1, trust_remote_code)
        from selfeval.bench.memory import bench_memory

        with _progress("bench memory", quiet) as report_progress:
            found = bench_memory(
                options,
                learner=learner,
                requests=requests,
                samples=samples,
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                batch_size=batch_size,
                report_progress=report_progress,
            )
        if as_json:
            _say_json(found)
        else:
            print_memory(found)


def _options(
    model: str | None, device: str, precision: str, threads: int, rounds: int, trust_remote_code: bool
) -> BenchOptions:
    quiet_libraries()
    from selfeval.bench.workloads import BenchOptions

    return BenchOptions(model, device, precision, threads, rounds, trust_remote_code)


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the current step on standard error: updated in place on a terminal, one line per step elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda text: None
    elif not console.is_terminal:
        yield lambda text: console.print(f"{title}: {text}", highlight=False, markup=False, soft_wrap=True)
    else:
        with console.status(title) as status:
            yield lambda text: status.update(f"{title}: {text}")


# -- output -------------------------------------------------------------------------------------------------------------


def _say(found: BenchResult, as_json: bool) -> None:
    if as_json:
        _say_json(found)
    else:
        print_times(found)


def _say_json(found: BenchResult | MemoryResult) -> None:
    from selfeval.texts import safe_json

    typer.echo(safe_json(found.as_json(), indent=2))


def print_times(found: BenchResult, console: Console | None = None) -> None:
    """Print the sides of each comparison as a table, and how far they agree."""
    from rich.console import Console

    from selfeval.cli.judge_figures import text_table

    console = console or Console()
    _line(console, _subject(found))
    for comparison in found.comparisons:
        wait = "CPU" if comparison.measure == "cpu" else "wall"
        _line(console, f"\n{comparison.title}: {comparison.units:,} {comparison.unit}")
        header = ("side", "CPU s", "wall s", "spread", f"per {wait} s", "ratio to ours")
        console.print(text_table(header, [_row(comparison, side) for side in comparison.sides]))
    _line(console, "* the fastest setting of a side; spread: lowest and highest of the rounds")
    for name, values in found.checks.items():
        _line(console, f"check: {name.replace('_', ' ')}: {_words(values)}")


def _subject(found: BenchResult | MemoryResult) -> str:
    machine = found.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
    threads = f"{machine['threads']} of {machine['cores']} cores"
    return f"{found.model}, {found.precision}, on {machine['device']} ({machine['processor']}, {threads}); {versions}"


def _row(comparison: Comparison, side: SideTimes) -> tuple[str, ...]:
    measure = comparison.measure
    several = sum(other.group == side.group for other in comparison.sides) > 1
    mark = " *" if several and side is comparison.best(side.group) else ""
    values = side.values(measure)
    return (
        f"{_SIDES[side.group]}, {side.setting}{mark}",
        f"{side.median('cpu'):.3f}",
        f"{side.median('wall'):.3f}",
        f"{min(values):.3f}-{max(values):.3f}",
        f"{comparison.rate(side):,.0f}",
        f"{comparison.ratio(side):.2f}",
    )


def _words(values: Any) -> str:
    if not isinstance(values, dict):
        return "yes" if values is True else "no" if values is False else _number(values)
    return ", ".join(f"{name.replace('_', ' ')} {_words(value)}" for name, value in values.items())


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "none" if value is None else str(value)


def print_memory(found: MemoryResult, console: Console | None = None) -> None:
    """Print the peaks of each phase in MiB."""
    from rich.console import Console

    from selfeval.cli.judge_figures import text_table

    console = console or Console()
    _line(console, _subject(found))
    _line(console, f"\npeak MiB above the process before loading; one copy of the weights has {_mib(found.weights)} MiB")
    rows = [
        (
            phase.phase,
            _mib(phase.ours),
            _mib(phase.planned),
            _mib(phase.hugging_face) + (" (computed)" if phase.is_computed else ""),
            f"{phase.planned / phase.ours:.2f}",
            f"{phase.hugging_face / phase.ours:.2f}",
        )
        for phase in found.phases
    ]
    header = ("phase", "ours", "selfeval plan", "Hugging Face", "plan/ours", "Hugging Face/ours")
    console.print(text_table(header, rows))
    _line(
        console,
        "Hugging Face's update is computed: our peak, and further copies of the weights for reference, evaluator and critic.",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _line(console: Console, text: str) -> None:
    from selfeval.texts import visible

    console.print(visible(text, keep="\n"), highlight=False, markup=False, soft_wrap=True)
