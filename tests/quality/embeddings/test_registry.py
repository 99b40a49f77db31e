"""The embedder of a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from processes import python_anew
from selfeval.config import EMBEDDERS, RunConfig, load_config
from selfeval.errors import ConfigError, MissingPackageError
from selfeval.quality.embeddings.backbone import BackboneEmbedder
from selfeval.quality.embeddings.cache import CachedEmbedder
from selfeval.quality.embeddings.registry import embedder_of
from selfeval.quality.embeddings.static import StaticEmbedder
from tiny_models import backbone

TEXTS = ["Tom has 3 apples.", "Anna has 4 pens.", "How many are left?"]


def test_the_default_is_the_model_of_the_run(tmp_path: Path) -> None:
    model = backbone("llama", vocabulary=384)
    found = embedder_of(RunConfig(), model, TEXTS, folder=tmp_path)
    assert isinstance(found, CachedEmbedder)
    assert isinstance(found.embedder, BackboneEmbedder)
    assert np.linalg.norm(found.embed(TEXTS), axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    with pytest.raises(ConfigError, match="needs the model of the run"):
        embedder_of(RunConfig(), None, TEXTS)


def test_settings_have_the_name_of_the_embedder() -> None:
    config = load_config(None, {}, ["embeddings.embedder=static", "embeddings.static.method=glove"])
    assert isinstance(embedder_of(config, None, TEXTS), StaticEmbedder)
    stored = config.model_dump(mode="json")
    assert stored["embeddings"]["static"]["method"] == "glove"
    assert RunConfig.model_validate(stored) == config


def test_wrong_names_are_explained() -> None:
    with pytest.raises(
        ConfigError, match=r'did you mean "backbone"\? allowed: backbone, static, sentence-transformers, endpoint'
    ):
        load_config(None, {}, ["embeddings.embedder=backbon"])
    with pytest.raises(ConfigError, match=r'set embeddings\.embedder = "static"'):
        load_config(None, {}, ["embeddings.static.method=glove"])


def test_a_model_of_sentence_transformers_is_required_and_must_exist(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    config = load_config(None, {}, ["embeddings.embedder=sentence-transformers"])
    with pytest.raises(ConfigError, match=r"sentence-transformers\.model is not set"):
        embedder_of(config, None, TEXTS)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    config = load_config(None, {}, ["embeddings.embedder=static"])
    with pytest.raises(MissingPackageError, match=r"self-evaluator\[data\]"):
        embedder_of(config, None, TEXTS * 2 + [f"{t} and more" for t in TEXTS])


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, selfeval.quality.embeddings.registry, selfeval.quality.embeddings.backbone\n"
        "import selfeval.quality.embeddings.static, selfeval.quality.embeddings.sentence_transformers\n"
        "heavy = {'sklearn', 'gensim', 'sentence_transformers', 'openai', 'faiss'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    found = python_anew(code)
    assert found.stdout == "[]\n", found.stderr


def test_every_section_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert all(f"[embeddings.{name}]" in page for name in EMBEDDERS)
