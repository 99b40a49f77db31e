from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import tiny_models
from scarce import no_memory
from selfeval.backbone.roles import Backbone
from selfeval.errors import RoleError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12), (5, 9, 2, 14)]
ENDS = (1, 3, 20, 21, 22)


def guided_backbone(family: str = "llama", vocabulary: int = 40) -> Backbone:
    """A policy, and two value functions with different outputs."""
    backbone = tiny_models.backbone(family, vocabulary, eos=ENDS)
    for number, role in enumerate(("policy", "q-0", "q-1")):
        backbone.roles.add(role, seed=number)
        tiny_models.scramble(backbone, role, seed=number, size=0.1)
    return backbone


def sample(backbone: Backbone, requests: Sequence[Request], guide: Guide | None, **options: int) -> list[Rollout]:
    with backbone.acting_as("policy"):
        return generate(backbone, requests, max_new_tokens=options.pop("limit", 12), seed=4, guide=guide, **options)


def plain_logprobs(backbone: Backbone, ids: Sequence[int], guide: Guide, temperature: float) -> Tensor:
    """`[T, V]` from the definition, policy * exp(strength * mean of log-ratios): a plain pass of one sequence for each role."""
    found = []
    for role in ("policy", *guide.roles):
        with backbone.acting_as(role):
            found.append(tiny_models.full_logprobs(backbone.model, ids, temperature).double())
    policy, *values = found
    weights = policy.exp() * torch.stack([guide.strength * (v - policy) for v in values]).mean(0).exp()
    return (weights / weights.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_roles_that_say_what_the_policy_says_change_nothing(family: str) -> None:
    backbone = tiny_models.backbone(family, eos=ENDS)
    for role in ("policy", "q-0", "q-1"):
        backbone.roles.add(role)
    for role in ("policy", "q-0", "q-1"):
        tiny_models.scramble(backbone, role, size=0.1)  # the same weights
    requests = [Request(Prompt(p), (1.0, 0.0, 0.7)[i % 3]) for i, p in enumerate(PROMPTS * 6)]
    found, expected = sample(backbone, requests, Guide(("q-0", "q-1"), 3.0)), sample(backbone, requests, None)
    assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("mixes", [True, False], ids=["one pass", "a pass for each role"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_guided_logprobs_equal_plain_passes_of_every_role(family: str, mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows leave at different steps: a cache that kept another row would give other log-probs from there on.
    backbone, guide = guided_backbone(family), Guide(("q-0", "q-1"), 1.6)
    monkeypatch.setattr(backbone._stack, "mixes_rows", mixes)
    requests = [Request(Prompt(p), (1.0, 0.7)[i % 2]) for i, p in enumerate(PROMPTS * 6)]
    found = sample(backbone, requests, guide)
    assert len({len(r.ids) for r in found}) > 3
    for request, rollout in zip(requests, found, strict=True):
        full = plain_logprobs(backbone, (*request.prompt.ids, *rollout.ids), guide, request.temperature)
        expected = [full[len(request.prompt.ids) - 1 + t, token].item() for t, token in enumerate(rollout.ids)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
    free = sample(backbone, requests, None)
    assert sum(a.ids != b.ids for a, b in zip(found, free, strict=True)) > 10  # the guide has an effect


def test_greedy_takes_the_likeliest_token_of_the_guided_distribution() -> None:
    backbone, guide = guided_backbone(), Guide(("q-0", "q-1"), 5.0)
    for prompt in PROMPTS:
        (rollout,) = sample(backbone, [Request(Prompt(prompt), 0.0)], guide)
        ids = list(prompt)
        for token, logprob in zip(rollout.ids, rollout.logprobs, strict=True):
            full = plain_logprobs(backbone, ids, guide, 1.0)[-1]
            assert (token, logprob) == (int(full.argmax()), pytest.approx(full.max().item(), abs=1e-4))
            ids.append(token)


def test_sampling_has_the_guided_distribution() -> None:
    backbone, guide = guided_backbone(vocabulary=40), Guide(("q-0",), 2.0)
    rollouts = sample(backbone, [Request(Prompt((5, 9, 2)))] * 6000, guide, limit=1, batch_size=24000)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=40).double()
    probabilities = plain_logprobs(backbone, (5, 9, 2), guide, 1.0)[-1].exp()
    big = probabilities * 6000 >= 5
    wanted = torch.cat([probabilities[big], probabilities[~big].sum()[None]]) * 6000
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    statistic, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2)) > 1e-4
    with backbone.acting_as("policy"):
        policy = tiny_models.full_logprobs(backbone.model, (5, 9, 2))[-1].exp().double()
    assert float(((counts / 6000 - policy).abs()).sum()) > 0.2  # not the policy's own


def test_too_little_memory_and_other_rows_beside_change_no_token() -> None:
    requests, guide = [Request(Prompt(p), 1.0 + 0.1 * (i % 3)) for i, p in enumerate(PROMPTS * 8)], Guide(("q-0", "q-1"), 1.6)
    expected = sample(guided_backbone(), requests, guide)
    backbone = guided_backbone()
    with no_memory(backbone, rows=27, written=8) as failed:
        scarce = sample(backbone, requests, guide)
    assert failed
    assert {e.phase.value for e in backbone.budget.take_events()} == {"rollout"}
    for found in (scarce, sample(guided_backbone(), requests, guide, batch_size=12)):  # 12 rows are 4 replies
        assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_count_every_role_that_is_read() -> None:
    backbone, seen = guided_backbone(), []
    backbone.model.base_model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    sample(backbone, [Request(Prompt((5, 9, 2, i))) for i in range(4, 14)], Guide(("q-0", "q-1"), 1.0), batch_size=12, limit=2)
    assert max(seen) == 12


def test_watched_tokens_are_those_of_the_guided_distribution() -> None:
    backbone, guide = guided_backbone(), Guide(("q-0", "q-1"), 1.6)
    with backbone.acting_as("policy"):
        (rollout,) = generate(backbone, [Request(Prompt((5, 9)), 0.7)], max_new_tokens=4, seed=1, watch=(3, 17), guide=guide)
    full = plain_logprobs(backbone, (5, 9, *rollout.ids), guide, 1.0)
    for step, row in enumerate(rollout.watched):
        assert row == pytest.approx(full[1 + step, [3, 17]].tolist(), abs=1e-4)


def test_a_guide_that_is_not_there_is_refused() -> None:
    backbone = guided_backbone()
    with pytest.raises(RoleError, match='there is no role "q-9"'):
        sample(backbone, [Request(Prompt((5,)))], Guide(("q-9",), 1.0))
    with pytest.raises(RoleError, match="select a role first"):
        generate(backbone, [Request(Prompt((5,)))], max_new_tokens=1, seed=0, guide=Guide(("q-0",), 1.0))
