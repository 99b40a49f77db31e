"""Q functions that are roles: adapters on the one base, without a separate output layer.

With pi_ref the reference and pi_q what a Q role says of the next token through the frozen output layer:

    Q(s, a) = b(s) + c (log pi_q(a|s) - log pi_ref(a|s)),   c = 0.25

Any Q can be written so, with pi_q = pi_ref exp((Q - b) / c) and b(s) = c log sum_a pi_ref(a|s) exp(Q(s, a) / c), its soft
value at temperature c (the identity of Rafailov et al. 2024, section 4, https://arxiv.org/abs/2404.12358). The two parts have
separate roles, as in a dueling network (Wang et al. 2016, https://arxiv.org/abs/1511.06581): learning what a state is worth
moves the hidden states far, and would move what the adapter says of the next token with them. b is the same number for all
tokens and cancels in decoding; so its role may read what the evaluator reads.

The value of a token that was drawn is a log-prob and costs no logits; where a sum over the vocabulary is needed, it is made a
few positions at a time, without gradient.

Shapes: B replies, R reply tokens, N tokens that count, C of them at a time, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selfeval.algorithms.masked import masked_sum, zero_padding
from selfeval.algorithms.q_learning import kl_soft_value
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_hidden
from selfeval.training.context import POLICY, REFERENCE, LearnerContext
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.replay import Replayed

__all__ = [
    "Q_ROLES",
    "TARGET_ROLES",
    "UNIT",
    "VALUE_ROLE",
    "add_q_roles",
    "add_value_role",
    "chosen_token_values",
    "gradients",
    "log_ratios",
    "polyak_update",
    "q_targets",
    "soft_values",
    "state_values",
]

Q_ROLES, VALUE_ROLE = ("q-0", "q-1"), "q-state"
TARGET_ROLES = {role: f"{role}-target" for role in (*Q_ROLES, VALUE_ROLE)}
"""The target network of each role: a frozen copy that `polyak_update` moves."""

UNIT = 0.25
"""c: whitened reward per nat by which a Q role leads away from the reference."""

_CHUNK_BYTES, _HELD = 64 << 20, 8
"""Memory of a chunk of positions, and how many times the vocabulary it holds in fp32."""

Compute = Callable[[Replayed], Tensor]


def add_q_roles(context: LearnerContext) -> None:
    """Add two Q roles, the role of the state values, and a target copy of each. All values start at 0.

    The Q roles start as copies of the policy, which is the reference. If that is the bare base they differ in the random half
    of their adapters; in any case each reads the replies in a different order.
    """
    backbone = context.backbone
    start = None if backbone.roles.is_bare(POLICY) else POLICY
    for number, role in enumerate(Q_ROLES):
        backbone.roles.add(role, seed=(context.seed + number) % 2**31, copy_of=start)
    add_value_role(context, VALUE_ROLE)
    for role, target in TARGET_ROLES.items():
        backbone.roles.add(target, copy_of=role, head=role in backbone.roles.heads, trainable=False)


def add_value_role(context: LearnerContext, role: str) -> None:
    """Add a role for state values unless it exists: the adapter of `context.evaluator` if it is set, and a head of zeros."""
    backbone = context.backbone
    if role not in backbone.roles.names:
        backbone.roles.add(role, copy_of=context.evaluator, head=True)
    for parameter in backbone.roles.heads[role].parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def polyak_update(backbone: Backbone, share: float) -> None:
    """Move each target network towards its role by a share of the distance: Polyak averaging of the weights.

    Lillicrap et al. 2016, algorithm 1, https://arxiv.org/abs/1509.02971.
    """
    for role, target in TARGET_ROLES.items():
        for ours, theirs in zip(
            backbone.roles.parameters(target).values(), backbone.roles.parameters(role).values(), strict=True
        ):
            ours.lerp_(theirs, share)


def log_ratios(context: LearnerContext, pool: Replayed) -> Tensor:
    """c (log pi_q - log pi_ref) of the sampled tokens by the acting role; `[B, R]`, garbage where the mask is False."""
    backbone, batch, temperature = context.backbone, pool.policy_batch, context.config.temperature
    hidden_BRD = reply_hidden(backbone, batch)
    found = token_logprobs(backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature)
    return UNIT * (found.logprobs - pool.ref_logprobs)


def state_values(context: LearnerContext, role: str, pool: Replayed) -> Tensor:
    """Compute the value head of `role`, which must be acting, before each token; `[B, R]`, garbage where the mask is False."""
    return context.backbone.score(role, reply_hidden(context.backbone, pool.critic_batch))


def chosen_token_values(context: LearnerContext, role: str, pool: Replayed) -> Tensor:
    """Compute the values of the chosen tokens by a Q role (`log_ratios`) or a role with a head; `[B, R]`, no gradient."""
    return _in_parts(context, pool, 1, lambda part: _of_role(context, role, part)[None])[0]


def _of_role(context: LearnerContext, role: str, part: Replayed) -> Tensor:
    with context.backbone.acting_as(role):
        return state_values(context, role, part) if role in context.backbone.roles.heads else log_ratios(context, part)


def soft_values(context: LearnerContext, pool: Replayed, beta: float) -> tuple[Tensor, Tensor]:
    """Compute the value of each state and Q of the chosen token by the target networks, the lower of the two for every token.

    V(s) = beta log sum_a pi_ref(a|s) exp(min_k Q_k(s, a) / beta)

    Returns:
        V and Q, each `[B, R]`, no gradient, 0 where the mask is False.
    """
    above = _in_parts(context, pool, 2, lambda part: _above_state(context, part, beta))
    states_BR = zero_padding(chosen_token_values(context, TARGET_ROLES[VALUE_ROLE], pool), pool.mask)
    return states_BR + above[0], states_BR + above[1]


def _above_state(context: LearnerContext, part: Replayed, beta: float) -> Tensor:
    """V - b and Q - b, `[2, B, R]`."""
    backbone, temperature = context.backbone, context.config.temperature
    batch, mask, hidden = part.policy_batch, part.mask, []
    for role in (REFERENCE, *(TARGET_ROLES[twin] for twin in Q_ROLES)):
        with backbone.acting_as(role):
            hidden.append(reply_hidden(backbone, batch)[mask])
    values_2N = torch.zeros(2, len(hidden[0]), device=mask.device)
    size = max(1, _CHUNK_BYTES // (4 * _HELD * backbone.output_head.vocabulary))
    for start in range(0, len(hidden[0]), size):
        chunk = slice(start, start + size)
        ref_CV, *roles_CV = (torch.log_softmax(backbone.logits(h[chunk]) / temperature, -1) for h in hidden)
        lower_CV = UNIT * (torch.minimum(*roles_CV) - ref_CV)
        values_2N[0, chunk] = kl_soft_value(lower_CV, ref_CV, beta=beta)
        values_2N[1, chunk] = lower_CV.gather(1, batch.reply_BR[mask][chunk, None])[:, 0]
    found = torch.zeros(2, *mask.shape, device=mask.device)
    found[:, mask] = values_2N
    return found


@torch.no_grad()
def _in_parts(context: LearnerContext, pool: Replayed, count: int, compute: Compute) -> Tensor:
    """Apply `compute` to micro-batches of replies and concatenate the results to `[count, B, R]`."""
    result = torch.zeros(count, *pool.mask.shape, device=pool.mask.device)

    def fill(group: list[int]) -> None:
        index = torch.tensor(group, device=result.device)
        result[:, index] = compute(pool.rows(index))

    for _ in context.backbone.budget.in_groups(Phase.SCORE, _sizes(pool), context.batch_tokens, fill):
        pass
    return result


def _sizes(pool: Replayed) -> list[int]:
    """Count the tokens of each reply with the longer of its two prompts."""
    sizes: list[int] = torch.maximum(pool.policy_batch.attention_BT.sum(-1), pool.critic_batch.attention_BT.sum(-1)).tolist()
    return sizes


def q_targets(
    rewards_BR: Tensor, taken_BR: Tensor, values_BR: Tensor, traces_BR: Tensor, mask_BR: Tensor, *, gamma: float
) -> Tensor:
    """Compute the targets of Q: one-step targets with the corrections of later steps.

    y_t = r_t + gamma (V_{t+1} + c_{t+1} (y_{t+1} - Q_{t+1})),   nothing after the last token

    The general operator of Munos et al. 2016, eq. 3 (https://arxiv.org/abs/1606.02647), with traces c: 0 is `td_target`,
    lambda is Q(lambda), lambda min(1, pi / mu) is their Retrace. Where Q and V are exact every correction is 0, whoever
    drew the tokens, so that the fixed point does not depend on c. With Q = V = 0 and c = 1 it is the return.

    Args:
        rewards_BR: reward of each token, without a KL penalty.
        taken_BR: Q of the drawn tokens, no gradient.
        values_BR: V of the state before each token, no gradient.
        traces_BR: c of each token, in [0, 1].
        mask_BR: True at the tokens of a reply, which has no gaps.
        gamma: discount per token, in [0, 1].

    Returns:
        y `[B, R]` in units of reward, 0 where the mask is False.
    """
    rewards_BR, taken_BR, values_BR = (zero_padding(x_BR, mask_BR) for x_BR in (rewards_BR, taken_BR, values_BR))
    following_B, columns = torch.zeros_like(rewards_BR[:, 0]), []
    for t in reversed(range(rewards_BR.shape[1])):
        y_B = torch.where(mask_BR[:, t], rewards_BR[:, t] + gamma * following_B, 0.0)
        following_B = values_BR[:, t] + traces_BR[:, t] * (y_B - taken_BR[:, t])
        columns.append(y_B)
    return torch.stack(columns[::-1], -1)


def gradients(
    context: LearnerContext, role: str, part: Replayed, targets_BR: Tensor, loss: Callable[[Tensor], Tensor]
) -> float:
    """Accumulate the gradient of a minibatch's loss in one role and return the loss, a weighted mean over its tokens.

    Args:
        role: a Q role, or one with a head.
        part: the minibatch.
        targets_BR: targets for the chosen tokens.
        loss: per token, from the error (target minus output).
    """
    backbone, parameters = context.backbone, list(context.backbone.roles.parameters(role).values())
    tokens = int(part.mask.sum())

    def of_group(group: list[int]) -> float:
        index = torch.tensor(group, device=part.mask.device)
        rows = part.rows(index)
        errors_BR = targets_BR[index] - _of_role(context, role, rows)
        summed = masked_sum(rows.weights * loss(errors_BR), rows.mask)
        found = summed.item()
        add_gradients(summed / tokens, parameters)
        return found

    groups = backbone.budget.in_groups(Phase.UPDATE, _sizes(part), context.batch_tokens, of_group)
    return sum(found for _, found in groups) / tokens
