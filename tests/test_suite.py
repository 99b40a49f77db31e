"""The settings of the test suite itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_files_that_are_distributed_first_exist() -> None:
    source = (TESTS / "conftest.py").read_text(encoding="utf-8")
    listed = re.findall(r'^    "(tests/[^"]+)",$', source, re.MULTILINE)
    assert len(listed) > 5
    assert [path for path in listed if not (TESTS.parent / path).exists()] == []


WHOLLY_SLOW = {
    "e2e/test_endpoint_run.py": "a whole run, judged by a server; judging/judges/test_endpoint.py asks one",
    "e2e/test_guide.py": "runs the snippets of the guide on a whole run",
    "e2e/test_peers.py": "needs the environment of make peers",
    "scale/test_nodes.py": "a cluster of three nodes; test_pool.py kills workers of one",
    "scale/test_run_on_workers.py": "whole runs on workers; test_pool.py has workers without a model",
    "serve/test_clients.py": "needs the environment of make clients",
    "serve/test_schema.py": "sends hundreds of random requests; test_server.py sends one of each kind",
    "training/test_kills.py": "kills a training twenty times; test_policy.py kills one once",
    "view/test_real_run.py": "a run that is killed; test_overview.py shows one whose files a test writes",
}
"""Files without any fast test, and why."""


def test_every_other_file_has_a_fast_test() -> None:
    slow = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py") if _is_wholly_slow(path)}
    assert slow == set(WHOLLY_SLOW)


def _is_wholly_slow(path: Path) -> bool:
    """Return whether `make test` runs nothing of this file: the module is marked slow, or each of its tests is."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    marks = [node.value for node in body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0])]
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return any(map(_is_slow, marks)) or all(any(map(_is_slow, test.decorator_list)) for test in tests)


def _is_slow(mark: ast.expr) -> bool:
    """Return whether this decorator or `pytestmark` is the mark, and not a parameter with the mark."""
    return any(ast.unparse(node) == "pytest.mark.slow" for node in (mark.elts if isinstance(mark, ast.List) else [mark]))
