"""Policy training on replies of another engine: log-probs of the backbone, and truncated importance weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import standin_vllm
import tiny_models
from policies import CONFIG, PROMPTS, CallingRecorder, changed, context_of, four_roles
from selfeval.algorithms.masked import aggregation_weights
from selfeval.algorithms.trust_region import flatten
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, LoraConfig, load_config
from selfeval.errors import LoopError
from selfeval.rollout.engines import OwnEngine
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.vllm_engine import VLLMEngine
from selfeval.stages.context import Context
from selfeval.stages.rounds import run_rounds
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore
from selfeval.training.context import POLICY, LearnerContext
from selfeval.training.experience import Experience, RewardScale, build_experience, experience_metrics
from selfeval.training.learners import make_learner
from selfeval.training.natural_step import step_outcome
from selfeval.training.policy import train_policy
from selfeval.training.policy_updates import policy_gradients
from selfeval.training.watchdogs import Alarm
from toy import FEW, LAB

ENGINE_METRICS = {"engine_difference", "engine_max_difference", "engine_kl", "engine_weight", "engine_truncated"}


class Shifted(OwnEngine):
    """Samples on the backbone, and reports log-probs that are lower by `shift`: every importance ratio is exp(shift)."""

    max_weight = 2.0

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def generate(self, backbone: Backbone, requests: Sequence[Request], **settings: Any) -> list[Rollout]:
        found = super().generate(backbone, requests, **settings)
        return [replace(r, logprobs=tuple(p - self.shift for p in r.logprobs)) for r in found]


def observed(context: LearnerContext) -> Experience:
    learner = make_learner(context)
    samples = learner.collect(PROMPTS, 1)
    scores = context.scorer(samples)
    scale = RewardScale.of(scores.whole_B, samples, whiten=True)
    return learner.advantages(samples, build_experience(context, samples, scores, scale, 0.1), scale)


def gradient(context: LearnerContext, experience: Experience) -> torch.Tensor:
    parameters = list(context.backbone.roles.parameters(POLICY).values())
    weights_BR = aggregation_weights(experience.mask, "token_mean")
    policy_gradients(context, experience, weights_BR, make_learner(context).loss)  # type: ignore[attr-defined]
    found = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


# -- weights ------------------------------------------------------------------------------------------------------------


def test_replies_of_the_own_engine_have_no_weights() -> None:
    experience = observed(context_of(four_roles()))
    assert experience.engine_weights is experience.engine_logprobs is None
    assert not ENGINE_METRICS & experience_metrics(experience).keys()
    loss = torch.ones(2)
    assert experience.weighted(loss) is loss


@pytest.mark.parametrize(("shift", "weight"), [(math.log(1.5), 1.5), (math.log(4), 2.0), (-math.log(4), 0.25)])
@pytest.mark.parametrize("learner", ["ppo", "grpo", "raft"])
def test_the_weights_multiply_the_gradient(learner: str, shift: float, weight: float) -> None:
    backbone = four_roles()
    own = context_of(backbone, changed(CONFIG, learner=learner))
    other = replace(own, engine=Shifted(shift))
    expected, experience = observed(own), observed(other)
    assert torch.equal(experience.policy_batch.reply_BR, expected.policy_batch.reply_BR)
    # Old log-probs are the backbone's, so the ratio of PPO is 1 before the update although the engine's differ.
    torch.testing.assert_close(experience.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(experience.rewards, expected.rewards, rtol=0, atol=1e-5)
    assert experience.engine_weights is not None
    assert experience.engine_weights[experience.mask].tolist() == pytest.approx([weight] * int(experience.mask.sum()), rel=1e-4)
    torch.testing.assert_close(gradient(other, experience), weight * gradient(own, expected), rtol=1e-3, atol=1e-6)


def test_the_weights_multiply_the_gain_of_a_natural_step_and_not_its_kl() -> None:
    backbone = four_roles()
    own = context_of(backbone, changed(CONFIG, learner="trpo"))
    expected, experience = observed(own), observed(replace(own, engine=Shifted(math.log(4))))
    start = flatten([p.detach() for p in backbone.roles.parameters(POLICY).values()])
    end = start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(5))
    plain, weighted = step_outcome(own, expected, start, end), step_outcome(own, experience, start, end)
    assert weighted.gain == pytest.approx(2 * plain.gain, rel=1e-3)
    assert weighted.kl == pytest.approx(plain.kl, rel=1e-4)


def test_the_metrics_measure_the_disagreement() -> None:
    found = experience_metrics(observed(replace(context_of(four_roles()), engine=Shifted(math.log(4)))))
    assert found["engine_difference"] == pytest.approx(math.log(4), abs=1e-4)
    assert found["engine_max_difference"] == pytest.approx(math.log(4), abs=1e-4)
    # k3 of d = log mu - log pi = -log 4: exp(-d) - 1 + d.
    assert found["engine_kl"] == pytest.approx(4 - 1 - math.log(4), abs=1e-3)
    assert (found["engine_weight"], found["engine_truncated"]) == (2.0, 1.0)
    exact = experience_metrics(observed(replace(context_of(four_roles()), engine=Shifted(0.0))))
    assert exact["engine_difference"] < 1e-5
    assert exact["engine_weight"] == pytest.approx(1.0, abs=1e-5)
    assert exact["engine_truncated"] == 0.0


# -- training through the stand-in of vLLM ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of `four_roles` as a folder."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_models.save_model(tiny_models.model("llama"), tiny_models.words_tokenizer(), folder)


def engine_of(model: Path, **settings: Any) -> VLLMEngine:
    return VLLMEngine(str(model), BackboneConfig(engine="vllm", lora=LoraConfig(rank=4, alpha=8.0), vllm=settings))  # type: ignore[arg-type]


def train_with(
    model: Path, folder: Path, learner: str = "ppo", *, iterations: int = 2, engine: VLLMEngine | None = None, **options: Any
) -> tuple[list[dict[str, float]], list[Alarm]]:
    config = changed(CONFIG, learner=learner, iterations=iterations, checkpoint_every=1)
    backbone = four_roles()
    recorder = CallingRecorder(folder, backbone, **options)
    context = replace(context_of(backbone, config), engine=engine or engine_of(model))
    train_policy(context, PROMPTS, recorder)
    return recorder.lines, recorder.alarms


@pytest.mark.parametrize("learner", ["ppo", "grpo", "remax"])
def test_a_training_runs_through_vllm(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: str) -> None:
    vllm = standin_vllm.install(monkeypatch)
    lines, alarms = train_with(model, tmp_path, learner)
    assert [line["step"] for line in lines] == [1.0, 2.0]
    for line in lines:
        assert line.keys() >= ENGINE_METRICS
        assert line["engine_difference"] < 1e-5
        assert line["engine_weight"] == pytest.approx(1.0, abs=1e-5)
        assert line["first_ratio"] < 1e-4
    assert {alarm.name for alarm in alarms} <= {"kl_runaway", "length_drift"}
    # A new adapter in every iteration: the update has changed it.
    names = [name for name, _ in vllm.made[0].calls]
    assert list(dict.fromkeys(names)) == ["policy-1", "policy-2"]


@pytest.mark.slow
def test_a_resumed_training_repeats_the_replies_of_the_stand_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds and adapters depend on the checkpoint alone; vLLM's own promise about equal seeds is weaker."""
    standin_vllm.install(monkeypatch)
    whole, _ = train_with(model, tmp_path / "whole", iterations=3)

    def killed(iteration: int, *_: Any) -> None:
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with(model, tmp_path / "killed", iterations=3, keep=killed)
    resumed, _ = train_with(model, tmp_path / "killed", iterations=3)
    assert resumed == whole[1:]


def test_an_engine_with_another_distribution_is_corrected_and_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin_vllm.install(monkeypatch, noise=1.0)
    lines, alarms = train_with(model, tmp_path, engine=engine_of(model, max_difference=10.0))
    for line in lines:
        assert line["engine_difference"] > 0.05
        assert line["engine_kl"] > 0
        assert 0 < line["engine_truncated"] < 1
        assert line["engine_weight"] < 2
        # The importance ratio of the update starts at 1 all the same.
        assert line["first_ratio"] < 1e-4
    assert "engine_disagrees" in {alarm.name for alarm in alarms}
    assert "ratio_not_one" not in {alarm.name for alarm in alarms}
    with pytest.raises(LoopError, match=r"the log-probs of vLLM and of the base differ by"):
        train_with(model, tmp_path / "strict")


@pytest.mark.slow
def test_a_run_samples_replies_and_rollouts_with_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model from its questions to a trained policy, and nothing to do a second time."""
    vllm = standin_vllm.install(monkeypatch)
    sizes = [*FEW, "questions.train=12", "questions.test=8", "evaluator.epochs=1", "policy.learner=grpo"]
    config = load_config(LAB / "recipe.toml", {"output": None}, [*sizes, "backbone.engine=vllm", "backbone.precision=fp32"])
    store = RunStore(tmp_path / "run")
    context = Context(config, store, Terminal(quiet=True))
    assert run_rounds(context, (1, "policy"))
    calls = [call for llm in vllm.made for call in llm.calls]
    assert {name.split("-")[0] if name else None for name, _ in calls} == {None, "policy"}
    lines = [json.loads(line) for line in store.metrics_path("policy").read_text().splitlines()]
    assert all(line["engine_difference"] < 1e-4 for line in lines)
    before = len(calls)
    assert not run_rounds(context, (1, "policy"))
    context.release()
    store.close()
    assert sum(len(llm.calls) for llm in vllm.made) == before
