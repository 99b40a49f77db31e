"""A language model small enough to be evaluated exactly: vocabulary 4, horizon 4, all 256 replies to each prompt enumerated.

`train` trains it with any learner through the loop that trains every other language model (`train_policy`); `judge` says how
far from the exact optimum it is. Judging samples nothing: return, KL and optimum are sums over all replies.

Shapes: N whole replies, T tokens of one, P prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_models
from policies import CallingRecorder
from selfeval.algorithms.mdp import TokenMDP, prefix_rows, solve_soft_token_mdp, token_mdp, token_rewards
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import PolicyConfig
from selfeval.prompt import Prompt
from selfeval.rollout.guide import Guide
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scores
from selfeval.training.evaluator import Preference
from selfeval.training.policy import train_policy
from selfeval.training.watchdogs import Alarm
from token_prompts import as_prompts

__all__ = [
    "HORIZON",
    "PROMPTS",
    "TASKS",
    "VOCABULARY",
    "Judgement",
    "TokenScorer",
    "dense",
    "judge",
    "make_backbone",
    "next_logprobs",
    "sparse",
    "train",
]

VOCABULARY, HORIZON = 4, 4
TASKS = {"first": (1,), "second": (3, 2)}
"""Two prompts of different lengths, to detect mistakes in padding and in grouping by question."""

PROMPTS = [QuestionPrompts(f"{task}/{copy}", Prompt(ids), Prompt(ids)) for copy in range(64) for task, ids in TASKS.items()]
"""Each asked as many questions: learners that compare the replies to one question have many small groups."""

MDPs = Mapping[str, TokenMDP]
"""Maps each question to the rewards of its replies."""


def sparse() -> MDPs:
    """Three of the 256 replies to each prompt have a reward, paid only for whole replies."""
    worth = {
        "first": {(0, 3, 1, 2): 1.0, (2, 2, 0, 1): 1.0, (2, 2, 3, 0): 0.8},
        "second": {(3, 0, 0, 1): 1.0, (1, 1, 2, 3): 1.0, (1, 3, 2, 3): 0.8},
    }
    plain = token_mdp(VOCABULARY, HORIZON, torch.zeros(VOCABULARY**HORIZON, dtype=torch.float64))
    places = {reply: n for n, reply in enumerate(plain.terminal_sequences)}
    found = {}
    for question, replies in worth.items():
        rewards_N = torch.zeros(len(places), dtype=torch.float64)
        for reply, reward in replies.items():
            rewards_N[places[reply]] = reward
        found[question] = token_mdp(VOCABULARY, HORIZON, rewards_N)
    return found


def dense() -> MDPs:
    """Every token is worth something that depends on the token before it, 0 on the average over the vocabulary."""
    generator = torch.Generator().manual_seed(6)  # the reference is worth about 0 there
    first_V, after_VV = (0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4,), (4, 4)))
    prefixes = token_mdp(VOCABULARY, HORIZON, torch.zeros(VOCABULARY**HORIZON)).prefixes
    rewards_PV = torch.stack([after_VV[prefix[-1]] if prefix else first_V for prefix in prefixes])
    mdp = TokenMDP(VOCABULARY, HORIZON, rewards_PV - rewards_PV.mean(-1, keepdim=True))
    return dict.fromkeys(TASKS, mdp)


@dataclass(frozen=True)
class TokenScorer:
    """Reward as the MDPs do: at the last token of a reply, or (`steps`) at every token."""

    mdps: MDPs
    steps: bool

    def __call__(self, samples: Samples) -> Scores:
        tokens_BT = torch.tensor([r.ids for r in samples.rollouts])
        rewards_BT = torch.zeros(tokens_BT.shape)
        for task, mdp in self.mdps.items():
            rows_B = torch.tensor([p.question_id.startswith(task) for p in samples.asked])
            rewards_BT[rows_B] = token_rewards(mdp, tokens_BT[rows_B]).float()
        whole_B = rewards_BT.sum(-1)
        return Scores(torch.zeros_like(whole_B), rewards_BT) if self.steps else Scores(whole_B)


def make_backbone(layers: int) -> Backbone:
    """A random Llama over exactly the tokens of the MDP (none of them ends a reply), with policy and reference on it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "initializer_range": 0.15}
    backbone = tiny_models.backbone("llama", VOCABULARY, rank=8, eos=(), pad_token_id=None, eos_token_id=None, **sizes)
    backbone.roles.add(POLICY, seed=1)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    return backbone


def train(
    backbone: Backbone, config: PolicyConfig, mdps: MDPs, folder: Path, *, steps: bool, pairs: Sequence[Preference] = ()
) -> tuple[Guide | None, list[dict[str, float]], list[Alarm]]:
    """Train the policy through the loop; return its value guidance or None, metrics and alarms."""
    recorder = CallingRecorder(folder, backbone)
    guide = train_policy(
        LearnerContext(
            backbone,
            config,
            TokenScorer(mdps, steps),
            seed=0,
            limit=HORIZON,
            batch_size=1024,
            batch_tokens=16384,
            evaluator=None,
            pairs=pairs,
        ),
        PROMPTS,
        recorder,
    )
    return guide, recorder.lines, recorder.alarms


@dataclass(frozen=True)
class Judgement:
    """Exact value of a policy, averaged over the prompts.

    Attributes:
        reward: E[R].
        kl: KL(policy || reference) of whole replies, in nats.
        objective: E[R] - beta KL.
        best: the largest objective that any policy has, beta log Z.
        best_reward: the largest reward of a reply.
    """

    reward: float
    kl: float
    objective: float
    best: float
    best_reward: float


def judge(backbone: Backbone, mdps: MDPs, beta: float, guide: Guide | None = None) -> Judgement:
    """Evaluate the policy, with its guidance if any, on all replies to every prompt."""
    rows = [_judge_one(backbone, prompt, mdps[task], beta, guide) for task, prompt in TASKS.items()]
    means: Any = torch.stack(rows).mean(0).tolist()
    return Judgement(*means)


def _judge_one(backbone: Backbone, prompt: tuple[int, ...], mdp: TokenMDP, beta: float, guide: Guide | None) -> Tensor:
    tokens_NT = torch.tensor(mdp.terminal_sequences)
    rows_NT, rewards_N = prefix_rows(mdp, tokens_NT), token_rewards(mdp, tokens_NT).sum(-1)
    policy_PV, ref_PV = (next_logprobs(backbone, role, prompt, mdp) for role in (POLICY, REFERENCE))
    if guide is not None:
        guides_KPV = torch.stack([next_logprobs(backbone, role, prompt, mdp) for role in guide.roles])
        policy_PV = guide.logprobs(policy_PV, guides_KPV)
    logprobs_N, ref_N = (table_PV[rows_NT, tokens_NT].sum(-1) for table_PV in (policy_PV, ref_PV))
    reward = logprobs_N.exp() @ rewards_N
    kl = logprobs_N.exp() @ (logprobs_N - ref_N)
    best = solve_soft_token_mdp(mdp, ref_PV, beta=beta).values_P[0]
    return torch.stack([reward, kl, reward - beta * kl, best, rewards_N.max()])


def next_logprobs(backbone: Backbone, role: str, prompt: tuple[int, ...], mdp: TokenMDP) -> Tensor:
    """Return the log-probs `[P, V]` of each next token after each prefix, from the backbone's passes over all whole replies.

    The passes are fp32; rows are renormalised to sum to one in fp64.
    """
    replies = mdp.terminal_sequences
    with backbone.acting_as(role):
        found = reply_logprobs(backbone, as_prompts([prompt] * len(replies)), replies, batch_tokens=16384)
    tokens_NT = torch.tensor(replies)
    logprobs_PV = torch.zeros_like(mdp.rewards_PV)
    logprobs_PV[prefix_rows(mdp, tokens_NT), tokens_NT] = torch.tensor(found, dtype=torch.float64)
    return logprobs_PV.log_softmax(-1)
