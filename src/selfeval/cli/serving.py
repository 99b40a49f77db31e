"""`selfeval serve`: the options of the server, and what it prints when it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.libraries import quiet_libraries
from selfeval.cli.places import RunFolder, for_reading
from selfeval.cli.server_options import check_server_packages, page_link, say, server_address, server_token
from selfeval.rollout.drafts import Speculation
from selfeval.texts import visible

if TYPE_CHECKING:
    from fastapi import APIRouter

__all__ = ["serve"]


def serve(
    folder: RunFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines can connect unless it is a loopback one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="SELFEVAL_TOKEN", help="Token that clients send as `Authorization: Bearer` (default: a random one)."
        ),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Accept requests without a token.")] = False,
    open_to_network: Annotated[
        bool, typer.Option("--open-to-network", help="Allow --no-token on an address that other machines can reach.")
    ] = False,
    places: Annotated[int, typer.Option(min=1, help="Replies that are sampled at a time, for each model.")] = 8,
    queue: Annotated[
        int, typer.Option(min=0, help="Replies, and scoring requests, that wait; more are answered with 429.")
    ] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a reply.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a prompt or of a text to score.")] = 2048,
    max_n: Annotated[int, typer.Option(min=1, help="Maximum n and best_of of a request.")] = 16,
    max_texts: Annotated[int, typer.Option(min=1, help="Maximum prompts, replies, documents or inputs of a request.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum bytes of a request body.")] = 4 << 20,
    speculation: Annotated[
        Speculation,
        typer.Option(
            help="Draft the next tokens of a reply that is sampled alone from earlier text: off, on, or auto, where earlier "
            "drafts were correct often enough. The tokens are the same."
        ),
    ] = Speculation.AUTO,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to finish after Ctrl-C or SIGTERM.")
    ] = 30.0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Execute custom code shipped with the model. Recipes and run folders cannot enable this.",
        ),
    ] = False,
    view: Annotated[bool, typer.Option("--view", help="Also serve the pages of `selfeval view` for this run.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")] = False,
) -> None:
    """Serve the policy, the base and the evaluator of a run over HTTP, in OpenAI's, Cohere's and Jina's formats.

    The server listens on this machine only and prints a random token, unless --host, --token or --no-token says otherwise. All
    models share one copy of the base, and concurrent requests share batches. Ctrl-C finishes the running requests; a second
    Ctrl-C ends at once. Needs the extra `serve`. Examples:

    selfeval serve runs/mine

    selfeval serve runs/mine --port 0 --token "$MY_TOKEN" --places 16
    """
    with clear_errors(debug, interrupted="The server had not started yet."):
        from selfeval.runs.reader import RunReader

        RunReader(for_reading(folder))  # refuses a folder that is not a run before loading the libraries
        check_server_packages("selfeval serve")
        from selfeval.serve.gate import Access, is_loopback
        from selfeval.serve.limits import Limits
        from selfeval.serve.process import listen

        access = Access(server_token(token, no_token, open_to_network, host, is_loopback(host)), is_loopback(host))
        listener = listen(host, port)
        quiet_libraries()
        from selfeval.serve.served_run import ServedRun
        from selfeval.serve.server import serve as serve_run

        run = ServedRun.load(folder, trust_remote_code=trust_remote_code)
        limits = Limits(max_body_bytes, max_prompt_tokens, max_tokens, max_n, max_texts, places, queue)
        lines = [
            f"Serving {visible(str(folder))} at {server_address(listener)}/v1 (models: {', '.join(run.names)})",
            f"Pages: {page_link(listener, access.token if token is None else None)}" if view else "",
            f"Token: {access.token}" if access.token is not None and token is None else "",
        ]
        ready = "\n".join(filter(None, lines))
        serve_run(
            run,
            listener,
            access,
            limits,
            drain_seconds=drain_seconds,
            ready=lambda: say(ready),
            pages=_pages(folder) if view else None,
            speculation=speculation,
        )


def _pages(folder: Path) -> APIRouter:
    """Return the pages of `selfeval view` for one run."""
    from selfeval.view.app import view_router
    from selfeval.view.opened import OpenedRuns

    return view_router(OpenedRuns([folder]))
