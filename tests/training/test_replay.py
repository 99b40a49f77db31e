from __future__ import annotations

import random
from collections import Counter

import torch

import tiny_models
from policies import PROMPTS, context_of
from selfeval.backbone.roles import Backbone
from selfeval.config import PolicyConfig
from selfeval.rollout.requests import Rollout
from selfeval.training.context import POLICY, REFERENCE, Samples, Scores
from selfeval.training.experience import Experience, RewardScale, build_experience
from selfeval.training.replay import Replay

REPLIES = [(5, 6), (7,), (8, 9, 10), (11, 12)]


def roles() -> Backbone:
    backbone = tiny_models.backbone()
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    return backbone


def observed(backbone: Backbone, first: int, count: int) -> Experience:
    """Replies number `first` and following; number n ends with reward n, and has token 13 + n as its last."""
    replies = [(*REPLIES[n % 4], 13 + n) for n in range(first, first + count)]
    samples = Samples(
        [PROMPTS[n % 6] for n in range(first, first + count)], [Rollout(r, (0.0,) * len(r), True) for r in replies]
    )
    config = PolicyConfig(reward_clip=None)
    scores = Scores(torch.arange(first, first + count).float())
    return build_experience(context_of(backbone, config), samples, scores, RewardScale(0.0, 1.0, 3.0), 0.0)


def test_what_was_remembered_comes_back_with_its_prompts_and_numbers() -> None:
    backbone, replay = roles(), Replay(10)
    experience = observed(backbone, 0, 5)
    replay.add(experience)
    pool = replay.sample(backbone, 5, random.Random(1))
    assert len(pool.mask) == 5
    for row, kept in enumerate(pool.mask):
        ids = tuple(pool.policy_batch.reply_BR[row, kept].tolist())
        number = ids[-1] - 13
        assert ids == (*REPLIES[number % 4], 13 + number)
        assert pool.rewards[row, kept].tolist() == [0.0] * (len(ids) - 1) + [float(number)]
        assert torch.equal(pool.ref_logprobs[row, kept], experience.ref_logprobs[number, experience.mask[number]])
        assert not pool.rewards[row, ~kept].any()
        for batch, prompt in ((pool.policy_batch, PROMPTS[number % 6].reply), (pool.critic_batch, PROMPTS[number % 6].grade)):
            real = batch.ids_BT[row, batch.attention_BT[row].bool()]
            assert tuple(real.tolist()) == (*prompt.ids, *ids)


def numbers_in(replay: Replay) -> list[int]:
    return [int(row.rewards[-1]) for row in replay.rows]


def test_the_oldest_leave_first() -> None:
    backbone, replay = roles(), Replay(6)
    for first in (0, 4, 8):
        replay.add(observed(backbone, first, 4))
    assert numbers_in(replay) == [6, 7, 8, 9, 10, 11]
    assert len(replay) == 6


def test_every_reply_is_drawn_as_often_as_any_other_and_once_at_most() -> None:
    backbone, replay = roles(), Replay(8)
    replay.add(observed(backbone, 0, 8))
    drawn: Counter[int] = Counter()
    for seed in range(400):
        pool = replay.sample(backbone, 3, random.Random(seed))
        numbers = [int(n) for n in pool.rewards.sum(-1)]
        assert len(set(numbers)) == 3
        drawn.update(numbers)
    # 1200 draws of 8: 150 each, with a standard deviation of sqrt(400 * 3/8 * 5/8) = 9.7.
    assert all(abs(drawn[n] - 150) < 5 * 9.7 for n in range(8)), drawn
    assert len(replay.sample(backbone, 99, random.Random(0)).mask) == 8


def test_its_state_brings_it_back_bit_for_bit() -> None:
    backbone, replay = roles(), Replay(7)
    for first in (0, 5):
        replay.add(observed(backbone, first, 5))
    again = Replay(7)
    again.add(observed(backbone, 20, 3))  # its contents are lost
    again.load(replay.state())
    assert numbers_in(again) == numbers_in(replay)
    for one, other in zip(again.rows, replay.rows, strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    again.add(observed(backbone, 25, 1))
    assert len(again) == 7  # and it still forgets the oldest
    empty = Replay(3)
    empty.load(Replay(3).state())
    assert len(empty) == 0
