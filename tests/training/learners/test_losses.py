"""Every loss that a learner can select: its gradient is that of the paper's formula, written out reply by reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import tiny_models
from policies import CONFIG, LIMIT, PROMPTS, changed, context_of, four_roles, policy_config
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences
from selfeval.prompt import Prompt
from selfeval.rollout.requests import Rollout
from selfeval.training import preference_pairs
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, Samples, Scores
from selfeval.training.evaluator import Preference
from selfeval.training.experience import Experience, RewardScale, build_experience
from selfeval.training.learners import make_learner
from selfeval.training.learners.dpo import _LOSSES, DPO, _LogProbs
from selfeval.training.learners.grpo import GRPO
from selfeval.training.preference_pairs import mismatched
from token_prompts import as_prompts

SCALE = RewardScale(0.0, 1.0, 1.0)


def away() -> Backbone:
    """A policy that has left its reference."""
    backbone = four_roles()
    tiny_models.scramble(backbone, POLICY, seed=9, size=0.06)
    return backbone


def logprobs(backbone: Backbone, prompt: Prompt, reply: tuple[int, ...]) -> Tensor:
    """Log-probs of the tokens of one reply under the acting role: one sequence, one plain pass."""
    logits = backbone.model(input_ids=torch.tensor([[*prompt.ids, *reply]])).logits[0, len(prompt.ids) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def gradients(backbone: Backbone, loss: Callable[[], Tensor]) -> list[Tensor]:
    with backbone.acting_as(POLICY):
        return list(torch.autograd.grad(loss(), list(backbone.roles.parameters(POLICY).values())))


def accumulated(backbone: Backbone) -> list[Tensor]:
    found = [p.grad for p in backbone.roles.parameters(POLICY).values()]
    return [g for g in found if g is not None]


def check_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


# -- pairs --------------------------------------------------------------------------------------------------------------

PAIRS = [
    Preference(PROMPTS[0].reply, (7, 9, 3, 8), (5, 2), 0.9),
    Preference(PROMPTS[1].reply, (4,), (6, 6, 2), 0.7),
    Preference(PROMPTS[2].reply, (3, 3), (8, 5, 9), 0.55),
]
BETA, Z0 = 0.7, 0.3


def formula(loss: str, ours: list[Tensor], theirs: list[Tensor], y: float) -> Tensor:
    """The loss of one pair, from the log-probs of the tokens of chosen and rejected under policy and reference."""
    (c, r), (rc, rr) = (x.sum() for x in ours), (x.sum() for x in theirs)
    mc, mr = (x.mean() for x in ours)
    h, rho_c, rho_r = c - rc - r + rr, c - rc, r - rr
    if loss == "sigmoid":  # labels smoothed by 0.1
        y = 0.9 * y + 0.1 * (1 - y)
        return -y * logsigmoid(BETA * h) - (1 - y) * logsigmoid(-BETA * h)
    if loss == "ipo":
        return (h - 1 / (2 * BETA)) ** 2
    if loss == "robust":  # a flip rate of 0.2
        return (-0.8 * logsigmoid(BETA * h) + 0.2 * logsigmoid(-BETA * h)) / 0.6
    if loss == "kto":
        return (1 - torch.sigmoid(BETA * (rho_c - Z0)) + 1 - torch.sigmoid(BETA * (Z0 - rho_r))) / 2
    if loss == "simpo":  # gamma = 0.4
        lead = BETA * (mc - mr) - 0.4
        return -y * logsigmoid(lead) - (1 - y) * logsigmoid(-lead)
    odds = [torch.log(m.exp() / (1 - m.exp())) for m in (mc, mr)]
    return -mc - BETA * logsigmoid(odds[0] - odds[1])


SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1},
    "ipo": {},
    "robust": {"flip_rate": 0.2},
    "kto": {},
    "simpo": {"simpo_gamma": 0.4},
    "orpo": {},
}


def learner_of(backbone: Backbone, loss: str, batch_tokens: int = 300, **settings: Any) -> DPO:
    config = changed(CONFIG, learner="dpo", loss=loss, pairs="kept", **settings)
    learner = make_learner(replace(context_of(backbone, config, batch_tokens), pairs=PAIRS))
    assert isinstance(learner, DPO)
    return learner


def kept(learner: DPO) -> preference_pairs.Pairs:
    return preference_pairs.kept_pairs(learner.context, PAIRS, with_reference=learner.settings.has_reference)


@pytest.mark.parametrize("loss", SETTINGS)
@pytest.mark.parametrize("batch_tokens", [300, 16])
def test_the_gradient_of_a_loss_of_pairs(loss: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = away()
    learner = learner_of(backbone, loss, batch_tokens, beta=BETA, **SETTINGS[loss])
    monkeypatch.setattr(learner, "_baseline", lambda pairs: torch.tensor(Z0))
    replies = [[(p.prompt, p.chosen), (p.prompt, p.rejected)] for p in PAIRS]
    with torch.no_grad(), backbone.acting_as(REFERENCE):
        theirs = [[logprobs(backbone, *reply) for reply in pair] for pair in replies]

    def plain() -> Tensor:
        ours = [[logprobs(backbone, *reply) for reply in pair] for pair in replies]
        losses = [formula(loss, o, t, p.label) for o, t, p in zip(ours, theirs, PAIRS, strict=True)]
        return torch.stack(losses).mean()

    expected = gradients(backbone, plain)
    values = learner._gradients(kept(learner), learner.settings.beta_of(0.05))
    check_equal(accumulated(backbone), expected)
    with backbone.acting_as(POLICY):
        assert values["policy_loss"] == pytest.approx(plain().item(), rel=1e-4)


@pytest.mark.parametrize("loss", SETTINGS)
def test_losses_without_a_reference_never_compute_it(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = preference_pairs.reference_logprobs
    monkeypatch.setattr(preference_pairs, "reference_logprobs", lambda *a: asked.append(1) or original(*a))
    learner = learner_of(four_roles(), loss)
    pairs = learner._pairs(SimpleNamespace(scores_B=torch.zeros(6)), 1)  # type: ignore[arg-type]
    assert bool(asked) == (pairs.ref_BR is not None) == (loss not in ("simpo", "orpo"))
    assert learner._gradients(pairs, learner.settings.beta_of(0.05))["pair_accuracy"] >= 0


def test_beta_is_the_kl_coefficient_unless_it_is_set_or_there_is_no_reference() -> None:
    backbone = four_roles()
    found = {loss: learner_of(backbone, loss).settings.beta_of(0.05) for loss in SETTINGS}
    assert found == {"sigmoid": 0.05, "ipo": 0.05, "robust": 0.05, "kto": 0.05, "simpo": 2.0, "orpo": 0.1}
    assert learner_of(backbone, "simpo", beta=1.5).settings.beta_of(0.05) == 1.5


def test_a_certain_reply_does_not_break_orpo() -> None:
    policy = torch.zeros(2, requires_grad=True)  # both replies have a probability of 1
    found = _LogProbs(policy, None, torch.ones(2), torch.ones(1), torch.zeros(()))
    settings = learner_of(four_roles(), "orpo").settings
    loss = _LOSSES["orpo"](found, settings, 0.1).sum()
    loss.backward()
    assert loss.isfinite()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_the_baseline_of_kto_is_the_mean_over_replies_put_to_other_questions() -> None:
    backbone = away()
    learner = learner_of(backbone, "kto")
    pairs = kept(learner)
    prompts = [p.prompt for p in PAIRS] * 2
    replies = [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS]
    others = [*prompts[1:], prompts[0]]  # of six rows with three prompts in turn, the next has another one
    leads = []
    for prompt, reply in zip(others, replies, strict=True):
        with torch.no_grad():
            with backbone.acting_as(POLICY):
                ours = logprobs(backbone, prompt, reply).sum()
            with backbone.acting_as(REFERENCE):
                leads.append(float(ours - logprobs(backbone, prompt, reply).sum()))
    assert float(learner._baseline(pairs)) == pytest.approx(max(0.0, sum(leads) / 6), abs=1e-4)
    assert float(learner._baseline(pairs.some(torch.tensor([1])))) == 0.0  # one question has no other
    assert float(learner_of(backbone, "ipo")._baseline(pairs)) == 0.0


def test_mismatched_replies_are_put_to_other_questions_whole() -> None:
    context = context_of(four_roles())
    prompts = [(5, 6, 7), (5, 6, 7), (8,), (5, 6, 7)]
    batch = pad_sequences(context.backbone, as_prompts(prompts), [(1,), (2, 3), (4, 4, 4), (9,)])
    found = mismatched(context, batch)
    assert found is not None
    assert [ids[:n].tolist() for ids, n in zip(found.ids_BT, found.prompt_lengths_B.tolist(), strict=True)] == [
        [8], [8], [5, 6, 7], [8],
    ]  # fmt: skip
    assert [ids[kept].tolist() for ids, kept in zip(found.reply_BR, found.mask_BR, strict=True)] == [
        [1],
        [2, 3],
        [4, 4, 4],
        [9],
    ]
    assert mismatched(context, pad_sequences(context.backbone, as_prompts([(5,), (5,)]), [(1,), (2,)])) is None


# -- groups -------------------------------------------------------------------------------------------------------------

REPLIES = [(7, 9, 3, 8), (5,), (2, 6), (4, 4, 9, 9, 2)]
REWARDS = [1.0, 0.0, 0.5, 3.0]


def grouped(context: LearnerContext, learner: GRPO) -> Experience:
    """Two questions with two replies each, of different length, drawn by a policy a little off the one that is trained."""
    asked = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    rollouts = []
    for prompt, reply in zip(asked, REPLIES, strict=True):
        with torch.no_grad(), context.backbone.acting_as(POLICY):
            drawn = logprobs(context.backbone, prompt.reply, reply) - 0.1 * torch.arange(1, len(reply) + 1)
        rollouts.append(Rollout(reply, tuple(drawn.tolist()), True))
    samples = Samples(asked, rollouts)
    return learner.advantages(samples, build_experience(context, samples, Scores(torch.tensor(REWARDS)), SCALE, 0.0), SCALE)


def of_group(loss: str, ours: list[Tensor], old: list[Tensor]) -> Tensor:
    """The loss of the four replies, by the formula of each paper; no token is clipped in a range of 0.9."""
    whole = [0.5, -0.5, -1.25, 1.25]  # less the mean of the question's two replies
    normed = [0.5**0.5, -(0.5**0.5)] if loss != "dr_grpo" else []
    advantages = whole if loss == "dr_grpo" else [normed[0], normed[1], normed[1], normed[0]]
    ratios = [(o - b).exp() for o, b in zip(ours, old, strict=True)]
    if loss == "gspo":
        return torch.stack([-a * r.log().mean().exp() for a, r in zip(advantages, ratios, strict=True)]).mean()
    if loss == "grpo":
        return torch.stack([-a * r.mean() for a, r in zip(advantages, ratios, strict=True)]).mean()
    total = torch.stack([-a * r.sum() for a, r in zip(advantages, ratios, strict=True)]).sum()
    return total / (4 * LIMIT if loss == "dr_grpo" else sum(map(len, REPLIES)))


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo", "dapo"])
def test_the_gradient_of_a_loss_of_groups(loss: str) -> None:
    backbone = away()
    settings = {"learner": "grpo", "loss": loss, "clip": 0.9, "clip_high": 0.9, "epochs": 1, "minibatch": 100}
    context = context_of(backbone, changed(CONFIG, **{**settings, "reward_clip": None}))
    learner = make_learner(context)
    assert isinstance(learner, GRPO)
    experience = grouped(context, learner)
    old = [row[kept] for row, kept in zip(experience.logprobs, experience.mask, strict=True)]
    asked = [PROMPTS[0].reply, PROMPTS[0].reply, PROMPTS[1].reply, PROMPTS[1].reply]

    def plain() -> Tensor:
        return of_group(loss, [logprobs(backbone, p, r) for p, r in zip(asked, REPLIES, strict=True)], old)

    expected = gradients(backbone, plain)
    norms = []
    learner.optimizers.step = lambda role, iteration: norms.append(accumulated(backbone)) or 0.0  # type: ignore[method-assign, func-returns-value]
    values = learner.update(experience, SCALE, 1)
    check_equal(norms[0], expected)
    assert values["clip_fraction"] == 0.0


def test_gspo_clips_whole_replies() -> None:
    backbone = away()
    context = context_of(backbone, policy_config(learner="grpo", loss="gspo", reward_clip=None))
    learner = make_learner(context)
    assert isinstance(learner, GRPO)
    assert learner.clip == (3e-4, 4e-4)
    experience = grouped(context, learner)
    now_BR = experience.logprobs + 0.1 * torch.arange(1, experience.mask.shape[1] + 1)
    # All ratios are above the range: the replies with a positive advantage are clipped, of 4 and 5 tokens among 12.
    assert float(learner.clip_fraction(now_BR, experience)) == pytest.approx(9 / 12)


def test_the_clip_of_dapo_is_higher_above() -> None:
    backbone = four_roles()
    for loss, expected in (("dapo", (0.2, 0.28)), ("grpo", (0.2, 0.2)), ("dr_grpo", (0.2, 0.2))):
        learner = make_learner(context_of(backbone, policy_config(learner="grpo", loss=loss)))
        assert isinstance(learner, GRPO)
        assert learner.clip == expected
