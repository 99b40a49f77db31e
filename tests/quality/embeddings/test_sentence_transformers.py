"""A model of sentence-transformers from a local folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from selfeval.config import SentenceTransformersConfig
from selfeval.errors import ModelError
from selfeval.quality.embeddings.sentence_transformers import SentenceTransformersEmbedder
from tiny_llama import write

# Not importorskip, which would import it while tests are collected: that takes many seconds.
pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")

TEXTS = ["Tom has 3 apples.", "", "小明有三个苹果", "Tom has 3 apples."]


def test_vectors_are_those_of_the_package(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write(tmp_path / "model")
    made = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    made.save_pretrained(str(tmp_path / "saved"))
    settings = SentenceTransformersConfig(model=str(tmp_path / "saved"))
    embedder = SentenceTransformersEmbedder(settings, device="cpu")
    found = embedder.embed(TEXTS)
    expected = made.encode([TEXTS[0], TEXTS[2]], normalize_embeddings=True)
    assert found[[0, 2]] == pytest.approx(expected, abs=1e-5)
    assert not found[1].any()
    assert (found[3] == found[0]).all()
    with_prompt = SentenceTransformersEmbedder(settings.model_copy(update={"prompt": "query: "}), device="cpu")
    assert with_prompt.name != embedder.name
    assert np.abs(with_prompt.embed(TEXTS[:1]) - found[:1]).max() > 1e-3


def test_pooling_and_default_prompt_are_part_of_the_name_and_the_folder_is_not(tmp_path: Path) -> None:
    """They have no weights, but other vectors."""
    import json
    import shutil

    from sentence_transformers import SentenceTransformer

    write(tmp_path / "model")
    SentenceTransformer(str(tmp_path / "model"), device="cpu").save_pretrained(str(tmp_path / "saved"))

    def named(folder: Path) -> str:
        return SentenceTransformersEmbedder(SentenceTransformersConfig(model=str(folder)), device="cpu").name

    def changed(name: str, file: str, **values: object) -> str:
        folder = Path(shutil.copytree(tmp_path / "saved", tmp_path / name))
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | values))
        return named(folder)

    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    before = named(tmp_path / "saved")
    assert named(tmp_path / "copy") == before
    (pooling,) = (tmp_path / "saved").glob("*_Pooling/config.json")
    file = str(pooling.relative_to(tmp_path / "saved"))
    settings = json.loads(pooling.read_text())
    cls = {"pooling_mode": "cls"} if "pooling_mode" in settings else {
        "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True
    }  # fmt: skip
    assert changed("cls", file, **cls) != before
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    assert changed("prompted", "config_sentence_transformers.json", **prompts) != before


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write(tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    weights = {name: values[:1] if values.ndim == 2 else values for name, values in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"embeddings\.sentence-transformers\.model = .*model cannot be loaded"):
        SentenceTransformersEmbedder(SentenceTransformersConfig(model=str(tmp_path / "model")), device="cpu")


def test_a_missing_model_is_named_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"embeddings\.sentence-transformers\.model = .*none cannot be loaded"):
        SentenceTransformersEmbedder(SentenceTransformersConfig(model=str(tmp_path / "none")))


def test_a_folder_with_modules_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]')
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    with pytest.raises(ModelError, match=r"modules with code of its own \(evil\.Evil\), which is never run"):
        SentenceTransformersEmbedder(SentenceTransformersConfig(model=str(tmp_path)), device="cpu")
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(ModelError, match="is damaged"):
        SentenceTransformersEmbedder(SentenceTransformersConfig(model=str(tmp_path)), device="cpu")
