"""The answers of servers and their cost, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.report.figures import count
from selfeval.report.schema import Server

__all__ = ["server_rows"]


def server_rows(servers: Sequence[Server]) -> list[tuple[str, str, str]]:
    """Return, for each quantity of each server: its role with the model, the name of the quantity, and the amount."""
    rows: list[tuple[str, str, str]] = []
    for server in servers:
        who = f"{server.role} {server.model} at {server.url}"
        tokens = f"{count(server.tokens_read)} read, {count(server.tokens_written)} written"
        rows += [(who, "answers", count(server.answers)), (who, "tokens", tokens)]
        if server.cost is not None:
            rows.append((who, "cost", f"{server.cost:,.4g}"))
    return rows
