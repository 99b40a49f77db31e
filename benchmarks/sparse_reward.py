"""One rewarded reply among 16,384: PPO as it is, with shaping, with a curiosity bonus, and with step rewards.

A tiny random language model writes replies of seven tokens from a vocabulary of four, and one reply to the prompt is worth 1.
The loop is the one that trains every language model (`train_policy`); the arms differ only in the scorer. Nothing
that is reported is sampled: the probability of the rewarded reply and the objective are sums over all replies, and the
optimum is solved (algorithms/mdp.py).

python benchmarks/sparse_reward.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from common import write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from selfeval.algorithms.mdp import TokenMDP, regularised_return, solve_soft_token_mdp, token_mdp, token_rewards
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import LoraConfig, PolicyConfig, PPOConfig
from selfeval.prompt import Prompt
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts, Samples, Scores
from selfeval.training.policy import train_policy
from selfeval.training.recorder import CheckpointRecorder

VOCABULARY, HORIZON, BETA = 4, 7, 0.05
PROMPT = (1,)
SEEDS = 5
FOUND = 0.5
"""Probability at which the rewarded reply counts as found."""
BONUS = 0.1
"""Curiosity bonus of a prefix that is seen for the first time."""


def config(gae_lambda: float) -> PolicyConfig:
    """PPO with the reward as it is, one weight of the KL penalty, and a rate at which this model learns in seconds."""
    return PolicyConfig(
        learner="ppo", iterations=100, questions_per_iteration=1, replies_per_question=128, epochs=2, minibatch=128,
        learning_rate=4e-3, warmup_iterations=0, kl_control="fixed", kl_coefficient=BETA, whiten_rewards=False,
        reward_clip=None, unfinished_penalty=0.0, checkpoint_every=1000, watchdogs="warn",
        ppo=PPOConfig(critic_learning_rate=1e-2, gae_lambda=gae_lambda, value_clip=None),  # type: ignore[call-arg]
    )  # fmt: skip


# -- the MDP and its variants -------------------------------------------------------------------------------------------


def target_of(seed: int) -> tuple[int, ...]:
    """The rewarded reply."""
    return tuple(random.Random(seed).randrange(VOCABULARY) for _ in range(HORIZON))


def sparse(target: Sequence[int]) -> TokenMDP:
    """1 for the target, at its last token."""
    plain = token_mdp(VOCABULARY, HORIZON, torch.zeros(VOCABULARY**HORIZON, dtype=torch.float64))
    rewards_PV = plain.rewards_PV.clone()
    rewards_PV[plain.prefixes.index(tuple(target[:-1])), target[-1]] = 1.0
    return TokenMDP(VOCABULARY, HORIZON, rewards_PV)


def step_rewards(target: Sequence[int]) -> TokenMDP:
    """On top, 1/7 for every token that is the target's after a prefix that is the target's."""
    mdp = sparse(target)
    rewards_PV = mdp.rewards_PV.clone()
    for t, token in enumerate(target):
        rewards_PV[mdp.prefixes.index(tuple(target[:t])), token] += 1 / HORIZON
    return TokenMDP(VOCABULARY, HORIZON, rewards_PV)


def shaped(target: Sequence[int]) -> TokenMDP:
    """On top, F = potential after the token - potential before it; no potential once the reply has ended.

    The potential of a prefix is the share of the target that it is the beginning of, and 0 where it is none. Ng et al. 1999,
    theorem 1: the optimal policy is that of the unshaped MDP, because F adds up to minus the potential of the start.
    """
    mdp = sparse(target)

    def potential(prefix: tuple[int, ...]) -> float:
        begun = len(prefix) < HORIZON and prefix == tuple(target[: len(prefix)])
        return len(prefix) / HORIZON if begun else 0.0

    shaping = [[potential((*p, v)) - potential(p) for v in range(VOCABULARY)] for p in mdp.prefixes]
    return TokenMDP(VOCABULARY, HORIZON, mdp.rewards_PV + torch.tensor(shaping, dtype=torch.float64))


# -- scorers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paid:
    """Reward each token as the MDP does."""

    mdp: TokenMDP

    def __call__(self, samples: Samples) -> Scores:
        steps_BR = token_rewards(self.mdp, torch.tensor([r.ids for r in samples.rollouts])).float()
        return Scores(torch.zeros(len(steps_BR)), steps_BR)


@dataclass(frozen=True)
class Curious:
    """Add a bonus for each prefix that a token leads to, BONUS / sqrt(n), n times that it was seen so far.

    Strehl and Littman 2008, section 2.2 (MBIE-EB), with counts of states, as in Bellemare et al. 2016, section 4.
    """

    mdp: TokenMDP
    seen: Counter[tuple[int, ...]] = field(default_factory=Counter)
    paid: list[float] = field(default_factory=list)

    def __call__(self, samples: Samples) -> Scores:
        replies = [r.ids for r in samples.rollouts]
        prefixes = [[ids[: t + 1] for t in range(len(ids))] for ids in replies]
        self.seen.update(prefix for row in prefixes for prefix in row)
        bonus_BR = torch.tensor([[BONUS * self.seen[prefix] ** -0.5 for prefix in row] for row in prefixes])
        self.paid.append(float(bonus_BR.sum(-1).mean()))
        return Scores(torch.zeros(len(replies)), token_rewards(self.mdp, torch.tensor(replies)).float() + bonus_BR)


ARMS: dict[str, tuple[Callable[[Sequence[int]], Any], float]] = {
    "plain": (lambda target: Paid(sparse(target)), 1.0),
    "shaping, lambda 1": (lambda target: Paid(shaped(target)), 1.0),
    "shaping, lambda 0": (lambda target: Paid(shaped(target)), 0.0),
    "plain, lambda 0": (lambda target: Paid(sparse(target)), 0.0),
    "curiosity bonus": (lambda target: Curious(sparse(target)), 1.0),
    "step rewards": (lambda target: Paid(step_rewards(target)), 1.0),
}
"""Scorer and `gae_lambda` of each."""


# -- the model, exactly -------------------------------------------------------------------------------------------------


def make_backbone(seed: int) -> Backbone:
    """Create a random Llama over the four tokens, none of which ends a reply, with the roles of policy learning."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, initializer_range=0.08, max_position_embeddings=64, pad_token_id=None,
                bos_token_id=None, eos_token_id=None, **sizes,
            )
        ).eval()  # fmt: skip
    made.requires_grad_(False)
    no_tokenizer = cast(PreTrainedTokenizerBase, None)  # there is no text here
    loaded = LoadedModel(made, no_tokenizer, torch.device("cpu"), "fp32", (), 0)
    backbone = Backbone(loaded, LoraConfig(rank=8, alpha=16.0), "four tokens")
    backbone.roles.add(POLICY, seed=seed)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    return backbone


@torch.no_grad()
def next_logprobs(backbone: Backbone, role: str, mdp: TokenMDP) -> Tensor:
    """Return the log-probs `[P, V]` of each next token after each prefix, from one pass over the longest prefixes."""
    prefixes = mdp.prefixes
    longest = [prefix for prefix in prefixes if len(prefix) == HORIZON - 1]
    ids_NT = torch.tensor([[*PROMPT, *prefix] for prefix in longest])
    with backbone.acting_as(role):
        hidden_NTD = backbone.hidden(ids_NT, torch.ones_like(ids_NT))[:, len(PROMPT) - 1 :]
        logprobs_NTV = backbone.logits(hidden_NTD).double().log_softmax(-1)
    # Prefixes of one length are in the order of the longest prefixes that start with them.
    levels = [logprobs_NTV[:: VOCABULARY ** (HORIZON - 1 - t), t] for t in range(HORIZON)]
    return torch.cat(levels)


def target_probability(backbone: Backbone, target: Sequence[int]) -> float:
    with backbone.acting_as(POLICY):
        [logprobs] = reply_logprobs(backbone, [Prompt(PROMPT)], [tuple(target)], batch_tokens=32768)
    return float(torch.tensor(logprobs).sum().exp())


# -- one training, and all ----------------------------------------------------------------------------------------------


def train(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return the probability of the target after each iteration, and the final objective of the sparse MDP."""
    make_scorer, gae_lambda = ARMS[arm]
    target = target_of(seed)
    backbone, scorer, mdp, started = make_backbone(seed), make_scorer(target), sparse(target), time.process_time()
    curve: list[float] = []

    class Curve(CheckpointRecorder):
        def metrics(self, *_: Any) -> None:
            curve.append(target_probability(backbone, target))

    with tempfile.TemporaryDirectory() as folder:
        train_policy(
            LearnerContext(
                backbone,
                config(gae_lambda),
                scorer,
                seed=seed,
                limit=HORIZON,
                batch_size=1024,
                batch_tokens=32768,
                evaluator=None,
            ),
            [QuestionPrompts("prompt", Prompt(PROMPT), Prompt(PROMPT))],
            Curve(Path(folder), backbone),
        )
    seconds = time.process_time() - started
    policy_PV, ref_PV = (next_logprobs(backbone, role, mdp) for role in (POLICY, REFERENCE))
    found = {
        "seed": seed,
        "found_at": next((i + 1 for i, share in enumerate(curve) if share >= FOUND), None),
        "target": curve[-1],
        "objective": float(regularised_return(mdp, policy_PV, ref_PV, beta=BETA)),
        "best": float(solve_soft_token_mdp(mdp, ref_PV, beta=BETA).values_P[0]),
        "seconds": round(seconds, 1),
        "curve": [round(share, 4) for share in curve[::10]],
    }
    if isinstance(scorer, Curious):
        found |= {"bonus_first": scorer.paid[0], "bonus_last": scorer.paid[-1]}
    print(arm, {key: value for key, value in found.items() if key != "curve"}, flush=True)
    return found


def optima(target: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the exact effect of shaping and step rewards on the optimum, at the model's reference, in fp64."""
    plain = sparse(target)
    ref_PV = next_logprobs(make_backbone(0), REFERENCE, plain)
    best = solve_soft_token_mdp(plain, ref_PV, beta=BETA)
    found = {}
    for name, mdp in (("shaping", shaped(target)), ("step rewards", step_rewards(target))):
        other = solve_soft_token_mdp(mdp, ref_PV, beta=BETA)
        lost = best.values_P[0] - regularised_return(plain, other.logprobs_PV, ref_PV, beta=BETA)
        moved = (other.logprobs_PV - best.logprobs_PV).abs().max()
        found[name] = {"largest_change_of_a_logprob": float(moved), "objective_lost": float(lost)}
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [row["found_at"] for row in rows if row["found_at"] is not None]
    return {
        "seeds": len(rows),
        "found": len(found),
        "median_found_at": statistics.median(found) if found else None,
        "gap": [(row["best"] - row["objective"]) / row["best"] for row in rows],
        "seconds": statistics.median(row["seconds"] for row in rows),
        "runs": list(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each arm")
    options = parser.parse_args()
    started = time.process_time()
    figures = {
        "vocabulary": VOCABULARY,
        "horizon": HORIZON,
        "beta": BETA,
        "bonus": BONUS,
        "found": FOUND,
        "iterations": config(1.0).iterations,
        "replies": config(1.0).replies_per_question,
        "optima": optima(target_of(0)),
        "arms": {arm: summary([train(arm, seed) for seed in range(options.seeds)]) for arm in ARMS},
    }
    figures["cpu_seconds"] = round(time.process_time() - started, 1)
    write("sparse_reward", f"python benchmarks/sparse_reward.py --seeds {options.seeds}", figures)


if __name__ == "__main__":
    main()
