"""`selfeval view`: pages over run folders, and the options that its pages share with `selfeval label`."""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.places import kept_fresh, place
from selfeval.cli.server_options import check_server_packages, page_link, say, server_token
from selfeval.texts import visible

if TYPE_CHECKING:
    from selfeval.view.label_desk import LabelDesk

__all__ = ["Host", "NoToken", "OpenBrowser", "OpenToNetwork", "PageOptions", "PagePort", "PageToken", "show_pages", "view"]

Host = Annotated[str, typer.Option(help="Address to listen on; other machines can connect unless it is a loopback one.")]
PagePort = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")]
PageToken = Annotated[
    str | None, typer.Option(envvar="SELFEVAL_TOKEN", help="Token in the link to the pages (default: a random one).")
]
NoToken = Annotated[bool, typer.Option("--no-token", help="Show the pages without a token.")]
OpenToNetwork = Annotated[
    bool, typer.Option("--open-to-network", help="Allow --no-token on an address that other machines can reach.")
]
OpenBrowser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the pages in the default browser.")]


@dataclass(frozen=True)
class PageOptions:
    """Options of a server of pages, as on the command line."""

    host: str
    port: int
    token: str | None
    no_token: bool
    open_to_network: bool
    browser: bool


def view(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]...", parser=place, help="Run folders, folders that contain some, or URLs of runs [default: runs]."
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: PagePort = 0,
    token: PageToken = None,
    no_token: NoToken = False,
    open_to_network: OpenToNetwork = False,
    browser: OpenBrowser = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Browse runs in a web browser: progress and curves, questions, replies, verdicts, pairs and drops, and comparisons.

    The server listens on this machine only and prints a link with a random token, unless --host, --token or --no-token says
    otherwise. Nothing is loaded from the internet. Run folders are only read, except for labels, which are added to
    labels.jsonl. Ctrl-C ends it. Needs the extra `serve`. Examples:

    selfeval view

    selfeval view runs/mine runs/other --port 8001 --no-browser
    """
    with clear_errors(debug, interrupted="The server had not started yet."):
        check_server_packages("selfeval view")
        options = PageOptions(host, port, token, no_token, open_to_network, browser)
        # Without arguments the folder may not exist yet: the pages say how to start a run, and show it when it begins.
        with kept_fresh(folders or []):
            show_pages(folders or [Path("runs")], options, may_be_missing=not folders)


def show_pages(
    folders: Sequence[Path],
    options: PageOptions,
    page: str = "",
    desk: LabelDesk | None = None,
    *,
    may_be_missing: bool = False,
) -> None:
    """Serve the pages of some runs until SIGINT or SIGTERM.

    Args:
        folders: run folders, or folders that contain some.
        options: options of the command line.
        page: Optional. Path of the page to open, below `/view/`, perhaps with a query. Default: the list of runs.
        desk: Optional. How pairs are labelled. Default: see `view_router`.
        may_be_missing: show a folder that does not exist when it appears. Default: False.

    Raises:
        InputError: an option or a folder is not allowed, or the address is in use.
    """
    from selfeval.serve.gate import Access, is_loopback
    from selfeval.serve.process import listen, serve_application
    from selfeval.view.app import make_view
    from selfeval.view.opened import OpenedRuns

    runs, loopback = OpenedRuns(folders, may_be_missing=may_be_missing), is_loopback(options.host)
    access = Access(server_token(options.token, options.no_token, options.open_to_network, options.host, loopback), loopback)
    listener = listen(options.host, options.port)
    link = page_link(listener, access.token, page)
    # A token that was passed is not repeated on the screen, as in `selfeval serve`.
    shown_link = link if options.token is None else f"{page_link(listener, None, page)}?token=..."

    def ready() -> None:
        count = len(runs.named())
        shown = "the pairs" if page else f"{count:,} {'run' if count == 1 else 'runs'}"
        say(f"Showing {shown} at {visible(shown_link)} (Ctrl-C ends the server)")
        if options.browser:
            # In a thread: a browser on the terminal returns when it is closed, and this is the thread of the server.
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()

    serve_application(make_view(runs, access, desk), listener, drain_seconds=1, ready=ready)
