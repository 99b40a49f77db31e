"""The server against its own OpenAPI schema: schemathesis generates valid and broken requests."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from processes import environment
from served import TOKEN, serving
from toy import ToyRun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed"),
]

# Its plugin is disabled in pyproject.toml, because every start of pytest would import it: here it runs as its own command.
RUN = "from schemathesis.cli import schemathesis; schemathesis()"
SETTINGS = """
[checks]
# A request that fits the schema may still be refused, with 400: a text may be too long, a conversation not end with a question.
positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]
"""


def test_schemathesis_finds_nothing(toy_run: ToyRun, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS, "utf-8")
    with serving(toy_run.folder, "--max-tokens", "4", "--max-n", "2", "--max-texts", "4") as served:
        command = [sys.executable, "-c", RUN, "run", f"{served.url}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}"]
        options = ["--checks", "all", "--max-examples", "30", "--seed", "1", "--phases", "examples,coverage,fuzzing"]
        found = subprocess.run(
            [*command, *options, "--generation-database", "none"],
            cwd=tmp_path,
            env={**environment(), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr
        assert served.http.get("/health").status_code == 200
        assert "Traceback" not in served.process.written("err")
    # It did send requests to every endpoint, which also accepted some of them.
    assert "repeatedly returned 404" not in found.stdout, found.stdout
    assert re.search(r"API Operations:\s+Selected: 11/11\s+Tested: 11", found.stdout), found.stdout
