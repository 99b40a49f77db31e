"""The watchdog of diversity in real trainings: a policy that learns one reply, and one that learns a reply per question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policies import CONFIG, CallingRecorder, changed, context_of, four_roles
from selfeval.config import PolicyConfig
from selfeval.prompt import Prompt
from selfeval.training.context import QuestionPrompts, Samples, Scores
from selfeval.training.policy import train_policy
from selfeval.training.watchdogs import Alarm

QUESTIONS = 8
LIKED = range(12, 12 + QUESTIONS)
"""The token that each question asks for."""
PROMPTS = [QuestionPrompts(f"q{t}", Prompt((t, t, t, t)), Prompt((31, t, t, t))) for t in LIKED]
SETTINGS = changed(
    CONFIG,
    **{
        "iterations": 14,
        "questions_per_iteration": QUESTIONS,
        "replies_per_question": 8,
        "minibatch": 32,
        "learning_rate": 4e-2,
        "kl_coefficient": 1e-3,
        "kl_control": "fixed",
        "kl_target": 1000.0,
        "watchdogs": "warn",
        "length_guard": None,
    },
)


def trained(folder: Path, wanted: Callable[[Prompt], int]) -> tuple[list[dict[str, float]], list[Alarm]]:
    """Train with a reward for each occurrence of the token that `wanted` returns for a prompt."""

    def score(samples: Samples) -> Scores:
        rows = zip(samples.asked, samples.rollouts, strict=True)
        return Scores(torch.tensor([float(sum(token == wanted(p.reply) for token in r.ids)) for p, r in rows]))

    backbone = four_roles()
    recorder = CallingRecorder(folder, backbone)
    config = PolicyConfig.model_validate(SETTINGS.model_dump())
    train_policy(replace(context_of(backbone, config), scorer=score), PROMPTS, recorder)
    return recorder.lines, recorder.alarms


def test_a_policy_that_learns_one_reply_to_all_questions_raises_the_alarm(tmp_path: Path) -> None:
    lines, alarms = trained(tmp_path, lambda prompt: 10)
    found = [alarm for alarm in alarms if alarm.name == "diversity_collapse"]
    assert lines[0]["similarity"] < 0.3
    assert lines[-1]["similarity"] > 0.9
    assert "if it rewards such replies, raise kl_coefficient" in found[-1].message
    assert found[0].step > 1
    assert {alarm.action for alarm in found} == {"warn"}


@pytest.mark.slow
def test_a_policy_that_learns_a_reply_per_question_raises_none(tmp_path: Path) -> None:
    lines, alarms = trained(tmp_path, lambda prompt: prompt.ids[0])
    assert lines[-1]["score"] > lines[0]["score"] + 1, "it did learn"
    assert lines[-1]["entropy"] < lines[0]["entropy"], "and is certain of its replies"
    assert max(line["similarity"] for line in lines) < 0.6
    assert [alarm for alarm in alarms if alarm.name == "diversity_collapse"] == []
