"""The harness of benchmarks/control, on tasks small enough that the results are known in advance."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dqn
import ppo
import run
import sac
import trpo
from environments import HOME, Gymnasium, Space, Step, evaluate, installed
from networks import Categorical, Critic, Gaussian, Policy
from replay import Replay
from rollout import Rollout, learn_from, rollouts

CHOICES, NUMBERS = Space(observations=2, actions=3), Space(observations=2, actions=1, bound=2.0)


class OneStep:
    """Episodes of one step, which pay for choice 2, or for numbers near 1: the best return is 1, or 0."""

    def __init__(self, space: Space, count: int) -> None:
        self.space, self.count = space, count

    def reset(self) -> Tensor:
        return torch.ones(self.count, self.space.observations)

    def step(self, actions: Tensor) -> Step:
        rewards_E = (actions == 2).float() if self.space.bound is None else -(actions[:, 0].clamp(-2, 2) - 1).square()
        ended_E = torch.ones(self.count, dtype=torch.bool)
        return Step(rewards_E, ended_E, ~ended_E, self.reset(), self.reset())


# -- what is learned ----------------------------------------------------------------------------------------------------


PPO = ppo.PPO(4_000, 8, 16, epochs=4, minibatch=64, gamma=0.9, lam=0.9, learning_rate=1e-2)
TRPO = trpo.TRPO(6_000, 8, 32, gamma=0.9, lam=0.9, critic_epochs=2, kl_bound=0.05)
DQN = dqn.DQN(600, 4, 1, 2, 32, 0.9, 1e-3, exploration_steps=400, least_exploration=0.1, target_every=40, first_steps=40)
SAC = sac.SAC(600, 2, batch=64, learning_rate=3e-3, averaging=0.05)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("learner", "settings", "space", "at_least"),
    [
        (ppo, PPO, CHOICES, 1.0),
        (trpo, TRPO, CHOICES, 1.0),
        (dqn, DQN, CHOICES, 1.0),
        (ppo, PPO, NUMBERS, -0.02),
        (trpo, TRPO, NUMBERS, -0.02),
        (sac, SAC, NUMBERS, -0.02),
    ],
    ids=("ppo choices", "trpo choices", "dqn choices", "ppo numbers", "trpo numbers", "sac numbers"),
)
def test_every_learner_finds_the_best_action(learner, settings, space: Space, at_least: float) -> None:
    """An untrained policy earns 1/3 on average among choices, and -1 for the number 0."""
    torch.manual_seed(0)
    act = learner.train(settings, OneStep(space, settings.environments))
    assert min(evaluate(act, OneStep(space, 4))) >= at_least


def test_sac_says_what_it_cannot_learn() -> None:
    with pytest.raises(ValueError, match="continuous actions"):
        sac.train(SAC, OneStep(CHOICES, 2))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("space", [CHOICES, NUMBERS], ids=("choices", "numbers"))
def test_a_step_of_trpo_stays_within_its_bound(space: Space) -> None:
    torch.manual_seed(0)
    policy, critic = Policy(space), Critic(space)
    before = copy.deepcopy(policy)
    batch = learn_from(next(rollouts(OneStep(space, 8), policy, 16)), policy, critic, gamma=0.9, lam=0.9)
    found = trpo.improve(policy, batch, TRPO)
    with torch.no_grad():
        moved = policy(batch.observations).kl_from(before(batch.observations)).mean().item()
    assert found.trials[-1].gain > 0
    assert moved == pytest.approx(found.trials[-1].kl, abs=1e-6)
    assert TRPO.kl_bound / 4 < moved <= TRPO.kl_bound


# -- what the learners are given ----------------------------------------------------------------------------------------


def test_a_time_limit_is_no_end_of_the_future() -> None:
    """Two environments, two steps, reward 1 each; V = 5 everywhere, gamma = 1/2, lambda = 1.

    The first is terminated by its last step: A_1 = 1 - 5, A_0 = 1 + 1/2 - 5. The second is cut there:
    A_1 = 1 + 5/2 - 5, A_0 = 1 + (1 + 5/2)/2 - 5. Returns are A + 5.
    """
    policy, critic = Policy(CHOICES), Critic(CHOICES)
    torch.nn.init.zeros_(critic.body[-1].weight)
    torch.nn.init.constant_(critic.body[-1].bias, 5.0)
    seen_ETO, last_ET = torch.zeros(2, 2, 2), torch.tensor([[False, True], [False, True]])
    first_E1 = torch.tensor([[True], [False]])
    rollout = Rollout(seen_ETO, torch.zeros(2, 2).long(), torch.ones(2, 2), last_ET & first_E1, last_ET & ~first_E1, seen_ETO)
    batch = learn_from(rollout, policy, critic, gamma=0.5, lam=1.0)
    torch.testing.assert_close(batch.advantages_N, torch.tensor([-3.5, -4.0, -2.25, -1.5]))
    torch.testing.assert_close(batch.returns_N, torch.tensor([1.5, 1.0, 2.75, 3.5]))


def test_the_value_after_the_last_step_counts_when_the_episode_goes_on() -> None:
    """V = 5, reward 1, gamma = 1/2: A = 1 + 5/2 - 5."""
    policy, critic = Policy(CHOICES), Critic(CHOICES)
    torch.nn.init.zeros_(critic.body[-1].weight)
    torch.nn.init.constant_(critic.body[-1].bias, 5.0)
    no_11, seen_112, chosen_11 = torch.tensor([[False]]), torch.zeros(1, 1, 2), torch.tensor([[0]])
    rollout = Rollout(seen_112, chosen_11, torch.ones(1, 1), no_11, no_11, seen_112)
    batch = learn_from(rollout, policy, critic, gamma=0.5, lam=1.0)
    torch.testing.assert_close(batch.advantages_N, torch.tensor([-1.5]))


def test_replay_forgets_the_oldest_and_draws_all_of_the_rest() -> None:
    replay = Replay(3)
    for number in range(5):
        value = torch.full((1,), float(number))
        no = torch.tensor([False])
        replay.add(value[:, None], torch.tensor([number]), Step(value, no, no, value[:, None] + 1, value[:, None]))
    torch.manual_seed(0)
    drawn = replay.draw(200)
    assert set(drawn.actions.tolist()) == {2, 3, 4}
    torch.testing.assert_close(drawn.rewards_B, drawn.actions.float())
    torch.testing.assert_close(drawn.successors_BO[:, 0], drawn.actions.float() + 1)


# -- distributions ------------------------------------------------------------------------------------------------------


def test_distributions_agree_with_those_of_torch() -> None:
    torch.manual_seed(0)
    mean, log_std, other, other_log_std = torch.randn(4, 5, 2, dtype=torch.float64)
    ours, old = Gaussian(mean, log_std), Gaussian(other, other_log_std)
    theirs, theirs_old = (torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (ours, old))
    actions = ours.sample()
    torch.testing.assert_close(ours.logprobs(actions), theirs.log_prob(actions).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    torch.testing.assert_close(ours.kl_from(old), torch.distributions.kl_divergence(theirs_old, theirs).sum(-1))
    chosen = Categorical(mean).sample()
    torch.testing.assert_close(
        Categorical(mean).logprobs(chosen), torch.distributions.Categorical(logits=mean).log_prob(chosen)
    )


def test_choices_are_drawn_as_often_as_they_should() -> None:
    """100,000 draws: the standard error of a share is below 0.0016, and five of those are allowed."""
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.7])
    shares = Categorical(p.log().expand(100_000, 3)).sample().bincount() / 100_000
    torch.testing.assert_close(shares, p, atol=0.008, rtol=0)


def test_the_squashed_density_is_that_of_the_transformed_normal() -> None:
    torch.manual_seed(0)
    actor, observations = sac.Actor(NUMBERS).double(), torch.randn(6, 2, dtype=torch.float64)
    actions, logprobs = actor.draw(observations)
    found = actor(observations)
    normal = torch.distributions.Normal(found.mean, found.log_std.exp())
    theirs = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(logprobs, theirs.log_prob(actions).sum(-1))


# -- Gymnasium itself ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (HOME / "ready").exists(), reason="no Gymnasium in build/gymnasium: benchmarks/control/run.py puts it")
def test_copies_do_what_a_single_environment_does() -> None:
    """Pendulum is truncated after 200 steps: both sides of the cut are returned, and the reset copy is another episode."""
    copies = Gymnasium("Pendulum-v1", 2, seed=3)
    alone = installed().make("Pendulum-v1")
    seen, _ = alone.reset(seed=4)  # copy number 1 gets the seed after the first's
    torch.testing.assert_close(copies.reset()[1], torch.from_numpy(seen))
    for number in range(200):
        step = copies.step(torch.tensor([[9.0], [0.5]]))
        seen, reward, terminated, truncated, _ = alone.step([0.5])
        torch.testing.assert_close(step.successors_EO[1], torch.from_numpy(seen))
        assert step.rewards_E[1].item() == pytest.approx(reward, abs=1e-6)
        assert (bool(step.terminated_E[1]), bool(step.truncated_E[1])) == (terminated, truncated) == (False, number == 199)
        assert torch.equal(step.successors_EO[1], step.observations_EO[1]) == (number < 199)


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    """Mean 3, s = sqrt(10/4), n = 5: half = 2.776 * 1.5811 / 2.2361 = 1.963."""
    assert run.figure([1.0, 2.0, 3.0, 4.0, 5.0]) == {"value": 3.0, "ci_low": 1.04, "ci_high": 4.96, "n": 5}
    assert run.figure([7.0])["ci_low"] is None


def test_a_finished_run_is_kept_until_what_it_was_asked_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(task: str, learner: str, seed: int) -> dict[str, float]:
        measured.append(seed)
        return {"seed": seed, "return": 1.0, "steps": 1, "cpu_seconds": 0.0, "episodes": run.EPISODES[task]}

    monkeypatch.setattr(run, "measure", measure)
    asked = ("CartPole-v1", "ppo", 4, tmp_path)
    for _ in range(2):
        run.run_once(*asked)
    assert measured == [4]
    assert run.kept(*asked) == {"seed": 4, "return": 1.0, "steps": 1, "cpu_seconds": 0.0, "episodes": 100}
    monkeypatch.setitem(run.SETTINGS["CartPole-v1"], "ppo", PPO)
    assert run.kept(*asked) is None
    run.run_once(*asked)
    assert measured == [4, 4]
    monkeypatch.setitem(run.EPISODES, "CartPole-v1", 7)
    assert run.kept(*asked) is None


def test_every_learner_has_a_published_figure_beside_it() -> None:
    assert {task: set(learners) for task, learners in run.SETTINGS.items()} == {
        task: set(learners) for task, learners in run.PUBLISHED.items()
    }
