"""Options that the servers have in common: packages, token, address."""

from __future__ import annotations

import secrets
import socket
import sys
from importlib.util import find_spec
from urllib.parse import urlencode

import typer

from selfeval.errors import InputError, MissingPackageError

__all__ = ["check_server_packages", "has_server_packages", "page_link", "say", "server_address", "server_token"]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def has_server_packages() -> bool:
    """Return whether the packages of the extra are installed."""
    return all(find_spec(package) is not None for package in _PACKAGES)


def check_server_packages(command: str) -> None:
    """Refuse to start without the packages of the extra.

    Raises:
        MissingPackageError: one is missing.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise MissingPackageError(command, package.replace("_", "-"), "serve")


def server_token(token: str | None, no_token: bool, open_to_network: bool, host: str, loopback: bool) -> str | None:
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


def server_address(listener: socket.socket) -> str:
    """Return the address of a server, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page_link(listener: socket.socket, token: str | None, page: str = "") -> str:
    """Return the link that opens the pages of `selfeval view`, or one of them, whose path is below `/view/`.

    Args:
        listener: the socket of the server.
        token: the token, which is added to the query; None without one.
        page: Optional. Path of the page, perhaps with a query. Default: the list of runs.
    """
    link = f"{server_address(listener)}/view/{page}"
    return link if token is None else f"{link}{'&' if '?' in page else '?'}{urlencode({'token': token})}"


def say(text: str) -> None:
    """Print at once, also into a pipe: programs wait for the address."""
    typer.echo(text)
    sys.stdout.flush()
