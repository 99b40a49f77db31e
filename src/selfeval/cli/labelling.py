"""`selfeval label`: let people compare two replies blindly, on a page, on the terminal, or through a pipe."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlencode

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.places import RunFolder, for_labels
from selfeval.cli.server_options import check_server_packages
from selfeval.cli.viewing import Host, NoToken, OpenBrowser, OpenToNetwork, PageOptions, PagePort, PageToken, show_pages
from selfeval.errors import InputError
from selfeval.texts import safe_json, visible

if TYPE_CHECKING:
    from selfeval.report.schema import HumanLabels
    from selfeval.runs.labelling import LabelSession, LabelTask, ShownPair

__all__ = ["label"]

_SAVED = "Every answer is saved; the same command continues with the next pair."
_KEYS = "1 first is better, 2 second is better, 0 tie, s skip, u undo, q quit"
_CHOICES = {"1": "first", "2": "second", "0": "tie", "s": "skip"}


def label(
    folder: RunFolder,
    rater: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the person (default: the login name).")] = None,
    use_for_training: Annotated[
        bool,
        typer.Option(
            "--use-for-training",
            help="Label pairs of training questions, which the next `selfeval run` trains on. Others are never trained on.",
        ),
    ] = False,
    pairs: Annotated[int | None, typer.Option(min=1, help="Number of pairs to answer (default: all).")] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Pairs that come early: uncertain, central (typical questions) or both; the last two need "
            "`selfeval search DIR` first (default: the order of the labels so far, or uncertain).",
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Label on the terminal, or through a pipe, instead of in a browser.")
    ] = False,
    host: Host = "127.0.0.1",
    port: PagePort = 0,
    token: PageToken = None,
    no_token: NoToken = False,
    open_to_network: OpenToNetwork = False,
    browser: OpenBrowser = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures from the labels so far as JSON, and end.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Compare pairs of replies by hand: which one is better?

    Opens a page on which replies are shown without scores and in random order; --terminal asks on the terminal. Keys: 1 first,
    2 second, 0 tie, s skip, u undo. Answers are appended to labels.jsonl in the run folder. After each one, the agreement of
    the evaluator and the judge with people is estimated for all judged test pairs. With enough labels, the evaluator's
    threshold for "unsure" is set for an error of at most 10%. Labels are gold in the report of a run without gold. The page
    needs the extra `serve`, and several people can use it at the same time. Examples:

    selfeval label runs/mine --rater ann

    selfeval label runs/mine --terminal --pairs 40

    selfeval label runs/mine --json
    """
    with clear_errors(debug, interrupted=_SAVED), for_labels(folder):
        from selfeval.runs.labelling import LabelSession, LabelTask

        if as_json and use_for_training:
            raise InputError("--json prints figures, which labels for training do not give; pass one of both options")
        task = LabelTask(folder, for_training=use_for_training, prefer=prefer)
        if as_json:
            typer.echo(safe_json(_figures(task).as_json(), indent=2))
            return
        session = LabelSession(task, _login() if rater is None else rater, pairs)
        if terminal:
            _ask_all(session, _typed_keys() if sys.stdin.isatty() else _piped_keys())
            return
        options = PageOptions(host, port, token, no_token, open_to_network, browser)
        _open_page(session, pairs, prefer, options)


def _open_page(session: LabelSession, most: int | None, prefer: str | None, options: PageOptions) -> None:
    check_server_packages("selfeval label without --terminal")
    from selfeval.view.label_desk import LabelDesk
    from selfeval.view.opened import OpenedRuns

    (name,) = OpenedRuns([session.task.folder]).named()
    desk = LabelDesk(session.rater, session.task.for_training, most, prefer)
    page = f"run/{quote(name, safe='')}/label?{urlencode({'rater': session.rater})}"
    show_pages([session.task.folder], options, page, desk)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # no entry for this user, as in some containers
        raise InputError("this user has no login name; pass --rater NAME") from error


def _figures(task: LabelTask) -> HumanLabels:
    from selfeval.report.labels import human_labels

    return human_labels(task.agreement(), task.threshold(), for_training=task.count_for_training())


# -- the dialogue -------------------------------------------------------------------------------------------------------


def _ask_all(session: LabelSession, keys: Iterator[str]) -> None:
    """Show pairs and save answers until the rater quits, the input ends, or no pair is left."""
    shown = session.next_pair()
    while shown is not None:
        _show(session, shown)
        key = next(keys, "q")
        if key == "q":
            break
        if key == "u":
            _undo(session)
        elif key in _CHOICES:
            session.answer(shown, _CHOICES[key])
            _say_progress(session)
        else:
            typer.echo(f"There is no key {visible(key)!r}: {_KEYS}.")
        shown = session.next_pair()
    else:
        typer.echo("No pair is left.")
    _close(session)


def _undo(session: LabelSession) -> None:
    if session.undo() is None:
        typer.echo("There is no answer to take back.")
    else:
        typer.echo("Took back the last answer.")
        _say_progress(session)


def _show(session: LabelSession, shown: ShownPair) -> None:
    done, total = session.progress
    texts = (("Question", shown.question), ("Reply 1", shown.first_text), ("Reply 2", shown.second_text))
    blocks = [f"{name}\n{_indented(text)}" for name, text in texts]
    typer.echo("\n\n".join([f"\nPair {done + 1} of {total}", *blocks, f"{_KEYS}: "]))


def _indented(text: str) -> str:
    # Untrusted text: control characters are shown, not executed by the terminal.
    return "\n".join(f"  {visible(line)}" for line in (text.splitlines() or ["(empty)"]))


def _say_progress(session: LabelSession) -> None:
    if session.task.for_training:
        done, total = session.progress
        typer.echo(f"{done} of {total} training pairs answered")
        return
    from selfeval.report.labels import agreement_sentence

    typer.echo(agreement_sentence(_figures(session.task)))


def _close(session: LabelSession) -> None:
    folder = session.task.folder
    if session.task.for_training:
        typer.echo(f"Labels: {session.task.file.path}. To train on them: selfeval run --output {folder}")
        return
    from selfeval.report.labels import threshold_sentence

    typer.echo(threshold_sentence(_figures(session.task).threshold))
    typer.echo(f"Labels: {session.task.file.path}. To update the report: selfeval report {folder}")


# -- input --------------------------------------------------------------------------------------------------------------


def _typed_keys() -> Iterator[str]:
    """Yield single keys, without Enter."""
    import click

    while True:
        try:
            key = click.getchar()
        except EOFError:
            return
        if not key.isspace():
            yield key.lower()


def _piped_keys() -> Iterator[str]:
    """Yield the characters of standard input, without white space."""
    while key := sys.stdin.read(1):
        if not key.isspace():
            yield key.lower()
