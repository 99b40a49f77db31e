"""Resume a run with its own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfeval.config import load_config
from selfeval.errors import RunFolderError
from selfeval.stages.running import config_to_run
from selfeval.store import RUN_SCHEMA, RunStore

KEY = "backbone.placement.folder"


def a_run(root: Path, folder: Path) -> Path:
    """Return a run whose configuration names a folder for weights."""
    store = RunStore(root)
    config = load_config(None, {"model": "some/model", KEY: str(folder)})
    store.update_run(schema=RUN_SCHEMA, status="running", config=config.model_dump(mode="json"))
    store.close()
    return root


def test_a_run_folder_cannot_choose_a_place_outside_of_it_to_write_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run = a_run(tmp_path / "run", elsewhere)
    with pytest.raises(RunFolderError, match=rf"{KEY} = .*elsewhere, .*add --set {KEY}=.*elsewhere"):
        config_to_run(None, run)
    for chosen in (elsewhere, tmp_path / "another"):
        config = config_to_run(None, run, assignments=[f"{KEY}={chosen}"])
        assert config.backbone.placement.folder == str(chosen)
    assert config_to_run(None, run, assignments=[f'{KEY}=""']).backbone.placement.folder == ""


def test_a_link_out_of_the_run_folder_is_outside_of_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", tmp_path / "run" / "weights")
    assert config_to_run(None, run).backbone.placement.folder == str(tmp_path / "run" / "weights")
    (run / "weights").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, match=r"weights is a link to .*, outside of"):
        config_to_run(None, run)
