"""The scripts of examples/clients, with real clients in a separate environment (`make clients` builds it)."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from served import QUESTION, TOKEN, Served, chat, serving
from toy import ToyRun

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "clients"
DOCUMENTS = ["3 - 2 = 1. The answer is 1.", "3 + 2 = 5. The answer is 5.", "Well, 6"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interpreter() -> str:
    found = runpy.run_path(str(SCRIPTS / "environment.py"))["interpreter"]()
    if found is None:
        pytest.skip("there is no environment with cohere, litellm and langchain-openai; make clients builds one")
    return str(found)


@pytest.fixture(scope="module")
def served(toy_run: ToyRun) -> Iterator[Served]:
    with serving(toy_run.folder) as found:
        yield found


@pytest.fixture(scope="module")
def reply(served: Served) -> str:
    found = served.post("/v1/chat/completions", chat(temperature=0)).json()["choices"][0]
    return str(found["message"]["content"])


@pytest.fixture(scope="module")
def ranked(served: Served) -> list[list[Any]]:
    body = {"model": "evaluator", "query": QUESTION, "documents": DOCUMENTS, "top_n": 2}
    results = served.post("/v2/rerank", body).json()["results"]
    return [[result["index"], pytest.approx(result["relevance_score"], abs=1e-4)] for result in results]


def _said(script: str, interpreter: str, served: Served) -> dict[str, Any]:
    done = subprocess.run(
        [interpreter, str(SCRIPTS / script)],
        env={**os.environ, "SELFEVAL_URL": served.url, "SELFEVAL_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_openai(interpreter: str, served: Served, reply: str) -> None:
    said = _said("openai_client.py", interpreter, served)
    best = served.post("/v1/chat/completions", chat(seed=1, best_of=4)).json()["choices"][0]
    assert (said["models"], said["reply"], said["streamed"]) == (["policy", "base", "evaluator"], reply, reply)
    assert (said["best"], said["score"]) == (best["message"]["content"], pytest.approx(best["score"], abs=1e-4))
    assert (said["confidence"], said["dimensions"]) == (pytest.approx(best["confidence"], abs=1e-4), 128)


def test_cohere(interpreter: str, served: Served, ranked: list[list[Any]]) -> None:
    said = _said("cohere_client.py", interpreter, served)
    assert said["v2"] == ranked
    assert said["v1"] == [[*row, DOCUMENTS[row[0]]] for row in ranked]


def test_litellm(interpreter: str, served: Served, reply: str, ranked: list[list[Any]]) -> None:
    said = _said("litellm_client.py", interpreter, served)
    assert (said["reply"].strip(), said["streamed"], said["dimensions"]) == (reply, reply, 128)
    assert said["ranked"] == ranked


def test_langchain(interpreter: str, served: Served, reply: str) -> None:
    said = _said("langchain_client.py", interpreter, served)
    assert said == {"reply": reply, "streamed": reply, "batch": [reply, reply], "dimensions": 128}
