"""`selfeval view`: pages over run folders."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.server_options import check_server_packages, page_link, say, server_token
from selfeval.texts import visible

__all__ = ["view"]


def view(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Run folders, or folders that contain some [default: runs].")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines can connect unless it is a loopback one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 0,
    token: Annotated[
        str | None,
        typer.Option(envvar="SELFEVAL_TOKEN", help="Token in the link to the pages (default: a random one)."),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Show the pages without a token.")] = False,
    open_to_network: Annotated[
        bool, typer.Option("--open-to-network", help="Allow --no-token on an address that other machines can reach.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the pages in the default browser.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Browse runs in a web browser: progress and curves, questions, replies, verdicts, pairs and drops, and comparisons.

    The server listens on this machine only and prints a link with a random token, unless --host, --token or --no-token says
    otherwise. Nothing is loaded from the internet, and run folders are only read. Ctrl-C ends it. Needs the extra `serve`.
    Examples:

    selfeval view

    selfeval view runs/mine runs/other --port 8001 --no-browser
    """
    with clear_errors(debug, interrupted="The server had not started yet."):
        check_server_packages("selfeval view")
        from selfeval.serve.gate import Access, is_loopback
        from selfeval.serve.process import listen, serve_application
        from selfeval.view.app import make_view
        from selfeval.view.opened import OpenedRuns

        # Without arguments the folder may not exist yet: the pages say how to start a run, and show it when it begins.
        runs = OpenedRuns(folders or [Path("runs")], may_be_missing=not folders)
        access = Access(server_token(token, no_token, open_to_network, host, is_loopback(host)), is_loopback(host))
        listener = listen(host, port)
        link = page_link(listener, access.token)

        def ready() -> None:
            count = len(runs.named())
            say(f"Showing {count:,} {'run' if count == 1 else 'runs'} at {visible(link)} (Ctrl-C ends the server)")
            if browser:
                webbrowser.open(link)

        serve_application(make_view(runs, access), listener, drain_seconds=1, ready=ready)
