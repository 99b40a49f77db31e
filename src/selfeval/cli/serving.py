"""`selfeval serve`: the options of the server, and what it prints when it is ready."""

from __future__ import annotations

import secrets
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from selfeval.cli.failures import clear_errors
from selfeval.cli.libraries import quiet_libraries
from selfeval.errors import InputError, MissingPackageError
from selfeval.rollout.drafts import Speculation
from selfeval.texts import visible

__all__ = ["serve"]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, e.g. runs/embedded.")],
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

        RunReader(folder)  # refuses a folder that is not a run before loading the libraries
        _check_packages()
        from selfeval.serve.gate import Access, is_loopback
        from selfeval.serve.limits import Limits
        from selfeval.serve.server import listen

        access = Access(_token(token, no_token, open_to_network, host, is_loopback(host)), is_loopback(host))
        listener = listen(host, port)
        quiet_libraries()
        from selfeval.serve.served_run import ServedRun
        from selfeval.serve.server import serve as serve_run

        run = ServedRun.load(folder, trust_remote_code=trust_remote_code)
        limits = Limits(max_body_bytes, max_prompt_tokens, max_tokens, max_n, max_texts, places, queue)
        lines = [
            f"Serving {visible(str(folder))} at {_address(listener)}/v1 (models: {', '.join(run.names)})",
            f"Token: {access.token}" if access.token is not None and token is None else "",
        ]
        ready = "\n".join(filter(None, lines))
        serve_run(
            run,
            listener,
            access,
            limits,
            drain_seconds=drain_seconds,
            ready=lambda: _say(ready),
            speculation=speculation,
        )


def _check_packages() -> None:
    """Refuse to start without the packages of the extra.

    Raises:
        MissingPackageError: one is missing.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise MissingPackageError("selfeval serve", package.replace("_", "-"), "serve")


def _token(token: str | None, no_token: bool, open_to_network: bool, host: str, loopback: bool) -> str | None:
    """Return the token to ask for; None for none."""
    if not no_token:
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
            raise InputError("--token must be one or more printable ASCII characters without a space at either end")
        return secrets.token_urlsafe(24) if token is None else token
    if token is not None:
        raise InputError("got both --token and --no-token (or the variable SELFEVAL_TOKEN is set); keep one of them")
    if not loopback and not open_to_network:
        raise InputError(
            f"--no-token with --host {host} would let every machine that can reach it use the model; remove --no-token, or add "
            "--open-to-network if that is intended"
        )
    return None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()
