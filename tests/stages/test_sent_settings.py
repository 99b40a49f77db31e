from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from selfeval.config import RunConfig
from selfeval.stages.running import new_config
from selfeval.stages.sent_settings import sent_settings


def test_paths_are_those_of_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"question": "How many?"}\n')
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig(model="model", seeds="seeds.jsonl", backbone={"placement": {"folder": "weights"}})
    sent = sent_settings(config).config
    assert (sent.model, sent.seeds) == (str(tmp_path / "model"), str(tmp_path / "seeds.jsonl"))
    assert sent.backbone.placement.folder == str(tmp_path / "weights")
    assert sent_settings(RunConfig(model="org/name")).config.model == "org/name", "a hub id"


def test_nothing_else_changes() -> None:
    config = new_config(assignments=["policy.learner=grpo", "verdicts.votes=3"])
    assert sent_settings(config).config == config


def test_a_worker_gets_the_keys_that_the_configuration_names(monkeypatch: pytest.MonkeyPatch) -> None:
    server = "evaluation.referee={url='https://127.0.0.1/v1', model='judge', key_variable='JUDGE_API_KEY'}"
    config = new_config(assignments=[server])
    sent = sent_settings(config, {"JUDGE_API_KEY": "secret", "OTHER_API_KEY": "other"})
    assert "secret" not in repr(sent)
    monkeypatch.setenv("JUDGE_API_KEY", "")
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.delenv("OTHER_API_KEY", raising=False)
    assert pickle.loads(pickle.dumps(sent)).receive() == config
    assert os.environ["JUDGE_API_KEY"] == "secret"
    assert "OTHER_API_KEY" not in os.environ
    monkeypatch.setenv("JUDGE_API_KEY", "that of this machine")
    sent.receive()
    assert os.environ["JUDGE_API_KEY"] == "that of this machine"


def test_a_key_that_is_not_set_is_not_sent() -> None:
    server = "evaluation.referee={url='https://127.0.0.1/v1', model='judge', key_variable='JUDGE_API_KEY'}"
    assert sent_settings(new_config(assignments=[server]), {}).keys == ()
