"""The map and the vectors of the replies are left out if the embedder fails; checks of the embedder before a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfeval.config import RunConfig, load_config
from selfeval.errors import ConfigError, EndpointError, MemoryLimitError, MissingPackageError, ModelError
from selfeval.evaluation.domain_map import results_of
from selfeval.quality.embeddings import Vectors
from selfeval.records import Question, Seed, Split
from selfeval.stages import vectors as stage_vectors
from selfeval.stages.context import Context
from selfeval.stages.preflight import check_input
from selfeval.stages.terminal import Terminal
from selfeval.stages.vectors import embed_replies, map_of_domain
from selfeval.store import RunStore
from toy import LAB

QUESTIONS = [Question(f"q{n}", f"How many {n}?", Split.TEST if n % 2 else Split.TRAIN, "self") for n in range(12)]
GLOVE = {
    "embeddings": {"embedder": "static", "static": {"method": "glove", "pooling": "mean", "dimensions": 8, "least_count": 1}}
}


def context(folder: Path, values: dict[str, Any]) -> Context:
    made = Context(RunConfig.model_validate(values), RunStore(folder / "run"), Terminal())
    vars(made)["seeds"] = [Seed("How many?")]
    vars(made)["backbone"] = None  # no embedder here uses it
    made.store.write_shard("questions", 0, QUESTIONS, [])
    return made


class Failing:
    """An embedder that is made, and fails when it embeds."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def embed(self, texts: Sequence[str]) -> Vectors:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no layer"),
        EndpointError("the server refused"),
        MemoryLimitError("too long"),
        MissingPackageError("work", "p"),
        ModelError("no model"),
    ],
)
def test_an_embedder_that_fails_leaves_out_map_and_vectors_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(stage_vectors, "fit_embedder", lambda context, texts: Failing(error))
    made = context(tmp_path, {})
    assert map_of_domain(made, QUESTIONS, results_of([], [], 1.0)) is None
    assert embed_replies(made, ["a"], ["b"]) is None
    printed = " ".join("".join(capsys.readouterr()).split())
    assert f"no map of the domain: {error}" in printed
    assert f"no Vendi score of the replies: {error}" in printed


def test_an_embedder_that_cannot_be_made_is_no_error_either(tmp_path: Path) -> None:
    made = context(tmp_path, {"embeddings": {"embedder": "endpoint"}})
    assert map_of_domain(made, QUESTIONS, results_of([], [], 1.0)) is None
    assert embed_replies(made, ["a"], ["b"]) is None


def test_words_that_only_replies_have_are_known(tmp_path: Path) -> None:
    before, after = ["red fox runs", "blue owl flies"] * 5, ["red fox sleeps", "green owl flies"] * 5
    found = embed_replies(context(tmp_path, GLOVE), before, after)
    assert found is not None
    assert found.embedder.startswith("static-glove")
    assert (len(found.before), len(found.after)) == (10, 10)
    assert np.linalg.norm(np.concatenate([found.before, found.after]), axis=1) == pytest.approx(np.ones(20), abs=1e-4)
    again = embed_replies(context(tmp_path / "again", GLOVE), before, after)
    assert again is not None
    assert (again.embedder, again.before.tolist()) == (found.embedder, found.before.tolist())


class OfOneWord:
    """An embedder that knows the word yes."""

    name = "of-one-word"

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.array([[float("yes" in text)] for text in texts], dtype=np.float32)


def test_no_vendi_score_if_many_replies_have_no_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_vectors, "fit_embedder", lambda context, texts: OfOneWord())
    made, known = context(tmp_path, {}), ["yes"] * 18
    assert embed_replies(made, [*known, "yes", "other"], [*known, "yes", "other"]) is not None, "5 % is allowed"
    assert embed_replies(made, [*known, "yes", " "], [*known, "", " "]) is not None, "empty, not unknown"
    assert embed_replies(made, [*known, "yes", "other"], [*known, "more", "other"]) is None
    assert "of-one-word has no vector for 3 of 40 replies" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("settings", "module", "expected"),
    [
        (["embeddings.embedder=endpoint"], "", r"embeddings\.endpoint\.url is not set"),
        (["embeddings.embedder=sentence-transformers"], "", r"sentence-transformers\.model is not set"),
        (
            ["embeddings.embedder=sentence-transformers", "embeddings.sentence-transformers.model=m"],
            "sentence_transformers",
            r"needs the package sentence-transformers",
        ),
        (["embeddings.embedder=static"], "gensim.models", r"needs the package gensim"),
    ],
)
def test_the_embedder_of_the_map_is_checked_before_the_run(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], module: str, expected: str
) -> None:
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises((ConfigError, MissingPackageError), match=expected):
        check_input(load_config(LAB / "recipe.toml", {}, settings), allow_code_execution=False)
    check_input(load_config(LAB / "recipe.toml", {}, [*settings, "evaluation.map_points=0"]))


def test_the_server_of_the_map_is_one_of_the_servers() -> None:
    settings = ["embeddings.embedder=endpoint", "embeddings.endpoint.url=http://localhost:1/v1"]
    assert set(load_config(None, {}, settings).all_servers) == {"embeddings.endpoint"}
    assert load_config(None, {}, [*settings, "evaluation.map_points=0"]).all_servers == {}
