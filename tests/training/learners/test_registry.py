"""A new learner is one file and one row of the registry: a throw-away one is configured, documented, trained and resumed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from policies import CONFIG, changed, four_roles, train
from selfeval.config import LEARNERS, LearnerConfig, LearnerSpec, RunConfig, load_config
from selfeval.config.fields import Positive
from selfeval.errors import ConfigError
from selfeval.stages.graph import stage_keys
from selfeval.stages.policy import output_roles
from selfeval.training.context import POLICY
from selfeval.training.experience import collect
from selfeval.training.learners.learner import Learner
from selfeval.training.policy_updates import Optimizers

GENERATOR = Path(__file__).resolve().parents[3] / "docs" / "generate_configuration.py"


class StubbornConfig(LearnerConfig):
    """Settings of a learner that changes nothing."""

    patience: Positive = 2.5
    """How long it does nothing."""


class Stubborn(Learner):
    """Samples, and never updates a weight."""

    def __init__(self, context: Any) -> None:
        self.context, self.patience = context, context.config.settings_as(StubbornConfig).patience
        self.roles = (POLICY,)
        self.optimizers = Optimizers(context.backbone, {POLICY: context.config.learning_rate}, context.config)

    def collect(self, prompts: Any, iteration: int) -> Any:
        return collect(self.context, prompts, iteration)

    def update(self, experience: Any, scale: Any, iteration: int) -> dict[str, float]:
        return {"entropy": 1.0, "patience": self.patience}

    def update_peaks(self, replies: int) -> list[Any]:
        return []


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> LearnerSpec:
    module = ModuleType("selfeval.training.learners.stubborn")
    module.Stubborn = Stubborn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = LearnerSpec(
        "stubborn", StubbornConfig, "stubborn:Stubborn", "Changes nothing.",
        compares_replies=True, outputs=("left-over",),
    )  # fmt: skip
    monkeypatch.setitem(LEARNERS, "stubborn", spec)
    return spec


def test_it_is_configured(stubborn: LearnerSpec) -> None:
    config = load_config(None, {}, ["policy.learner=stubborn", "policy.stubborn.patience=4"])
    assert config.policy.settings == StubbornConfig(patience=4.0)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert "left-over" in output_roles(config)
    for given, said in [
        (["policy.learner=stubbor"], 'did you mean "stubborn"?'),
        (["policy.stubborn.patience=4"], 'set policy.learner = "stubborn"'),
        (["policy.learner=stubborn", "policy.stubborn.patienc=4"], 'did you mean "patience"?'),
        (["policy.learner=stubborn", "policy.patience=4"], "write it as policy.stubborn.patience"),
        (["policy.learner=stubborn", "policy.replies_per_question=1"], "stubborn compares replies to the same question"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(None, {}, given)
        assert said in str(caught.value)


def test_its_settings_are_documented(stubborn: LearnerSpec) -> None:
    spec = importlib.util.spec_from_file_location("generate_configuration", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = generator.render()
    assert '### [policy.stubborn]\n\nChanges nothing. Only with `learner = "stubborn"`.' in page
    assert "| `patience` | number | `2.5` | > 0 | How long it does nothing. |" in page


def test_it_trains_and_resumes(stubborn: LearnerSpec, tmp_path: Path) -> None:
    config = changed(CONFIG, learner="stubborn", patience=3.0, iterations=4)
    backbone = four_roles()
    before = [p.detach().clone() for p in backbone.roles.parameters(POLICY).values()]
    lines, _ = train(backbone, tmp_path, config)
    assert [line["patience"] for line in lines] == [3.0] * 4
    assert all(bool((p == q).all()) for p, q in zip(backbone.roles.parameters(POLICY).values(), before, strict=True))
    again, _ = train(four_roles(), tmp_path, config)
    assert again == lines[3:]


def test_its_settings_are_part_of_the_key_of_its_stage(stubborn: LearnerSpec) -> None:
    def keys(*given: str) -> dict[str, str]:
        return stage_keys(load_config(None, {}, given), [])

    one, other = (keys("policy.learner=stubborn", f"policy.stubborn.patience={n}") for n in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"policy", "evaluation", "report"}
    assert keys() == keys("policy.learner=ppo", "policy.ppo.clip=0.2")
