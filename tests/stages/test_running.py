"""Resume a run with its own settings."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from selfeval.config import RunConfig, load_config
from selfeval.errors import RunFolderError
from selfeval.judging.templates import templates_folder
from selfeval.stages.running import config_to_run
from selfeval.store import RUN_SCHEMA, RunStore
from stage_world import World

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


# -- the user's files -----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, Path]:
    """Write a file for each setting that names one, outside of any run folder."""
    found = {"seeds": folder / "my seeds.txt", "templates": folder / "my templates", "gold": folder / "gold.jsonl"}
    found["seeds"].write_text("What is 3 + 4?\n")
    found["gold"].write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    shutil.copytree(templates_folder("no such model"), found["templates"])
    found["questions.file"] = folder / "questions.jsonl"
    found["questions.file"].write_text("".join(f'{{"question": "What is {n} + {n}?"}}\n' for n in range(8)))
    return found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Path]]:
    """A finished run that was made of the user's files."""
    world, files = World(tmp_path / "world", monkeypatch), files_of(tmp_path)
    world.run(*(f"{key}={path}" for key, path in files.items()))
    return world.run_folder, files


def value_of(config: RunConfig, key: str) -> Any:
    return attrgetter(key)(config)


def test_a_run_is_resumed_by_folder_with_the_files_that_it_was_made_of(made: tuple[Path, dict[str, Path]]) -> None:
    run, files = made
    config = config_to_run(None, run)
    assert {key: value_of(config, key) for key in files} == {key: str(path) for key, path in files.items()}


@pytest.mark.parametrize("key", ["seeds", "templates", "gold", "questions.file"])
def test_a_file_that_changed_since_the_run_is_read_only_if_the_command_names_it(
    made: tuple[Path, dict[str, Path]], key: str
) -> None:
    run, files = made
    changed = files[key] / "ask.jinja" if key == "templates" else files[key]
    changed.write_text(changed.read_text() + '{"question": "What is new?", "answer": "this"}\n')
    option = f"--set {shlex.quote(f'{key}={files[key]}')}"
    with pytest.raises(RunFolderError, match=rf"{key} = {files[key]}, which is outside of .* {option}"):
        config_to_run(None, run)
    config = config_to_run(None, run, assignments=[f"{key}={files[key]}"])
    assert value_of(config, key) == str(files[key])


def test_the_section_of_a_file_names_it_too(made: tuple[Path, dict[str, Path]]) -> None:
    run, files = made
    files["questions.file"].write_text('{"question": "Another"}\n')
    config = config_to_run(None, run, assignments=[f'questions={{file="{files["questions.file"]}"}}'])
    assert config.questions.file == str(files["questions.file"])


def test_a_run_keeps_its_own_seeds_if_the_command_says_so(made: tuple[Path, dict[str, Path]]) -> None:
    run, files = made
    files["seeds"].write_text("Another question?\n")
    with pytest.raises(RunFolderError, match=rf"to keep the run's own: --set seeds={run / 'seeds.jsonl'}"):
        config_to_run(None, run)
    assert config_to_run(None, run, assignments=[f"seeds={run / 'seeds.jsonl'}"]).seeds == str(run / "seeds.jsonl")
    files["seeds"].unlink()
    assert config_to_run(None, run).seeds == str(run / "seeds.jsonl")


@pytest.mark.parametrize("key", ["seeds", "templates", "gold", "questions.file", "replies.file", "pairs.file"])
def test_a_run_folder_from_somebody_else_cannot_name_a_file_to_read(tmp_path: Path, key: str) -> None:
    secret = tmp_path / "private" / "words.jsonl"
    secret.parent.mkdir()
    secret.write_text('{"question": "the words of the owner"}\n')
    named = secret.parent if key == "templates" else secret
    run, store = tmp_path / "run", RunStore(tmp_path / "run")
    config = load_config(None, {"model": "some/model", key: str(named)}).model_dump(mode="json")
    forged = dict.fromkeys(("the templates", "the file of questions, replies or pairs", "the gold file", "the seeds"), "0" * 64)
    for made_of in (None, forged):
        store.update_run(schema=RUN_SCHEMA, status="running", config=config, made_of=made_of)
        with pytest.raises(RunFolderError, match=f"{key} = {named}, which is outside of the run folder") as caught:
            config_to_run(None, run)
        assert "words of the owner" not in str(caught.value)
    store.close()


def test_a_file_that_is_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = RunStore(tmp_path / "run")
    config = load_config(None, {"model": "some/model", "gold": str(tmp_path / "pipe")}).model_dump(mode="json")
    store.update_run(schema=RUN_SCHEMA, status="running", config=config)
    store.close()
    with pytest.raises(RunFolderError, match=r"gold = .*pipe, which is outside of the run folder"):
        config_to_run(None, tmp_path / "run")


def test_a_run_folder_cannot_choose_a_server_or_a_key(tmp_path: Path) -> None:
    store, url, key = RunStore(tmp_path / "run"), "https://example.org/v1", "A_API_KEY"
    for section, asked, off in [
        ("verdicts.endpoint", ["verdicts.judge=endpoint"], "verdicts.judge=pairwise"),
        ("evaluation.referee", [], "evaluation.referee=none"),
    ]:
        given = [*asked, f"{section}.url={url}", f"{section}.model=m", f"{section}.key_variable={key}"]
        config = load_config(None, {"model": "some/model"}, given).model_dump(mode="json")
        store.update_run(schema=RUN_SCHEMA, status="running", config=config)
        with pytest.raises(
            RunFolderError, match=rf"sets {section}\.url = {url}, .*add --set {section}\.url={url} --set .*{key}"
        ):
            config_to_run(None, tmp_path / "run")
        # The user's own server does not get a key that the folder names.
        with pytest.raises(RunFolderError, match=rf"sets {section}\.key_variable = {key}, and"):
            config_to_run(None, tmp_path / "run", assignments=[f"{section}.url=https://other.example/v1"])
        found = config_to_run(None, tmp_path / "run", assignments=[f"{section}.url={url}", f"{section}.key_variable={key}"])
        assert [settings.key_variable for settings in found.servers.values()] == [key]
        assert config_to_run(None, tmp_path / "run", assignments=[off]).servers == {}
    store.close()


def test_a_run_folder_cannot_send_curves_to_a_server(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    for recorded in (["wandb"], ["tensorboard", "trackio"], ["mlflow"], ["tensorboard"]):
        config = load_config(None, {"model": "some/model", "trackers": recorded}).model_dump(mode="json")
        store.update_run(schema=RUN_SCHEMA, status="running", config=config)
        if recorded == ["tensorboard"]:  # writes into the run folder
            assert config_to_run(None, tmp_path / "run").trackers == ("tensorboard",)
            continue
        with pytest.raises(RunFolderError, match=rf"trackers = .*{recorded[-1]}.*add --set 'trackers=\["):
            config_to_run(None, tmp_path / "run")
        for chosen in (recorded, []):
            found = config_to_run(None, tmp_path / "run", assignments=[f"trackers={json.dumps(chosen)}"])
            assert list(found.trackers) == chosen
    store.close()
