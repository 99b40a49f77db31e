"""Links that lead out of a folder from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfeval.errors import ModelError
from selfeval.links import entries, refuse_links


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "templates").mkdir(parents=True)
    (folder / "chat.txt").write_text("ours")
    (tmp_path / "secret.txt").write_text("a password")
    return folder


@pytest.mark.parametrize("target", ["../../secret.txt", "ABSOLUTE", "../..", "../../missing.txt", "../link"])
def test_a_link_out_of_the_folder_is_refused_by_name(target: str, model: Path) -> None:
    (model / "link").symlink_to("../secret.txt")  # a link to a link out of the folder is one as well
    link = model / "templates" / "reply.jinja"
    link.symlink_to(str(model.parent / "secret.txt") if target == "ABSOLUTE" else target)
    with pytest.raises(ModelError, match=r"templates/reply\.jinja is a link to .* outside of .*; replace it with a copy"):
        refuse_links(model, entries(model / "templates"), ModelError)


def test_a_linked_folder_is_refused_and_not_read(model: Path) -> None:
    (model / "templates" / "more").symlink_to(model.parent)
    assert entries(model / "templates") == [model / "templates" / "more"]
    with pytest.raises(ModelError, match=r"templates/more is a link"):
        refuse_links(model, entries(model / "templates"), ModelError)


def test_a_loop_of_links_is_no_crash(model: Path) -> None:
    (model / "templates" / "a").symlink_to("b")
    (model / "templates" / "b").symlink_to("a")
    refuse_links(model, entries(model / "templates"), ModelError)  # it leads nowhere: opening it fails


def test_links_within_the_folder_and_a_linked_folder_that_the_user_names_are_fine(model: Path) -> None:
    (model / "templates" / "reply.jinja").symlink_to("../chat.txt")
    (model.parent / "alias").symlink_to(model)
    for root in (model, model.parent / "alias"):
        refuse_links(root, [*entries(root), root / "not there"], ModelError)


def test_the_hubs_cache_links_its_files_to_blobs_of_the_same_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    blob = tmp_path / "models--org--name" / "blobs" / "ff"
    for folder in (snapshot / "templates", blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("a template")
    (snapshot / "templates" / "reply.jinja").symlink_to("../../../blobs/ff")
    refuse_links(snapshot / "templates", entries(snapshot / "templates"), ModelError)
    (tmp_path / "secret.txt").write_text("a password")
    (snapshot / "templates" / "ask.jinja").symlink_to("../../../../secret.txt")
    with pytest.raises(ModelError, match=r"ask\.jinja is a link"):
        refuse_links(snapshot / "templates", entries(snapshot / "templates"), ModelError)


def test_the_packages_own_files_may_be_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers link the files of a package to their cache."""
    folder = tmp_path / "selfeval" / "templates"
    folder.mkdir(parents=True)
    (tmp_path / "cache").write_text("ours")
    (folder / "ask.jinja").symlink_to("../../cache")
    with pytest.raises(ModelError):
        refuse_links(folder, entries(folder), ModelError)
    monkeypatch.setattr("selfeval.links._PACKAGE", tmp_path / "selfeval")
    refuse_links(folder, entries(folder), ModelError)
