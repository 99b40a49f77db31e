"""`selfeval search`: its options, and what it prints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.libraries import quiet_libraries
from selfeval.cli.places import RunFolder, for_reading
from selfeval.errors import InputError
from selfeval.texts import safe_json, visible

if TYPE_CHECKING:
    from selfeval.runs.search import Found
    from selfeval.stages.terminal import Bar, Terminal

__all__ = ["search"]

_NOTHING_LOST = "The run was not changed; the same command starts again."
_TOP = 10
_LONGEST = 280
"""Characters of a text that are shown; --json prints all of them."""


def search(
    folder: RunFolder,
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Text to search for. Without it, only the index is built.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--in",
            metavar="KIND",
            help="Records to search: questions, replies, or pairs (by question).",
            show_default="questions",
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Maximum number of records.", show_default="10")] = None,
    recommend: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Print N training questions as seeds of a next run, where the evaluator is least certain."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per record, or the number of indexed texts.")
    ] = False,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Name the server of the run's embedder, which run.json alone cannot choose: embeddings.endpoint.url=URL.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Execute custom code shipped with the model.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress; print only errors and the records.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Search the questions, replies or pairs of a run by meaning, also while it is in progress.

    Texts are compared by the vectors of the run's embedder. The vectors are kept in DIR/embeddings and the index in DIR/search,
    and the next search only loads the model for the text that is searched for. `selfeval view` shows the pairs of similar
    questions once there is an index of the questions. Needs the extra `data`.

    With --recommend, the output is a seeds file: training questions, different from each other and from the seeds, near the
    test questions on which the evaluator is least certain. Examples:

    selfeval search runs/mine "How many are left?" --top 5

    selfeval search runs/mine "The answer is 12." --in replies --json

    selfeval search runs/mine --recommend 20 > more_seeds.jsonl
    """
    with clear_errors(debug, interrupted=_NOTHING_LOST):
        from selfeval.quality.vector_index import check_packages
        from selfeval.runs.run import Run
        from selfeval.runs.search import check_kind

        # Before the libraries and the model are loaded.
        _check_combination(text, kind, top, recommend, as_json=as_json)
        chosen = check_kind(kind or "questions")
        run = Run.open(for_reading(folder), trust_remote_code=trust_remote_code, servers=servers or ())
        check_packages()
        quiet_libraries()
        from selfeval.stages.terminal import Terminal

        terminal = Terminal(quiet)
        with _warnings_as_notes(terminal), _progress_bar(terminal) as report_progress:
            if recommend is not None:
                seeds = run.recommend_seeds(recommend, report_progress=report_progress, note=terminal.note)
                lines = [safe_json(seed.as_json()) for seed in seeds]
            elif text is None:
                count = run.build_index(chosen, report_progress=report_progress, note=terminal.note)
                said = f"{count:,} texts are indexed in {visible(str(run.folder))}"
                lines = [safe_json({"texts": count}) if as_json else said]
            else:
                found = run.search(text, chosen, top or _TOP, report_progress=report_progress, note=terminal.note)
                lines = [safe_json(one.as_json()) if as_json else _as_text(one) for one in found]
        typer.echo("\n".join(lines))


def _check_combination(text: str | None, kind: str | None, top: int | None, recommend: int | None, *, as_json: bool) -> None:
    """Refuse options that would have no effect."""
    if recommend is not None:
        if text is not None:
            raise InputError("pass either a text to search for or --recommend; seeds are recommended without a text")
        without_effect = {"--in": kind is not None, "--top": top is not None, "--json": as_json}
        if given := [name for name, is_given in without_effect.items() if is_given]:
            raise InputError(
                f"{', '.join(given)} cannot be used with --recommend N, which prints N training questions as JSON lines; "
                f"remove {', '.join(given)}"
            )
    elif text is None and top is not None:
        raise InputError("--top needs a text to search for; pass a text, or remove --top to build the index")


@contextmanager
def _warnings_as_notes(terminal: Terminal) -> Iterator[None]:
    """Show warnings about files of vectors, such as in a folder that is not writable, like other notes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"selfeval\.")
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if category is UserWarning:
                terminal.note(str(message))
            else:
                show(message, category, *rest, **named)

        warnings.showwarning = note
        yield


@contextmanager
def _progress_bar(terminal: Terminal) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while texts are embedded."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def report_progress(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(terminal.bar("embedding", total)))
            bars[0].advance(done - bars[0].done)

        yield report_progress


def _as_text(found: Found) -> str:
    """Return a record as lines: similarity, id and text, and the replies of a pair."""
    head = f"{found.similarity:.3f}  {visible(found.id)}  {_excerpt(found.text)}"
    if found.chosen is None or found.rejected is None:
        return head
    replies = (("chosen", found.chosen), ("rejected", found.rejected))
    return "\n".join(
        [f"{head}  (confidence {found.confidence:.2f})", *(f"       {n}: {_excerpt(text)}" for n, text in replies)]
    )


def _excerpt(text: str) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text.split())
    return visible(line if len(line) <= _LONGEST else f"{line[:_LONGEST].rstrip()} ...")
