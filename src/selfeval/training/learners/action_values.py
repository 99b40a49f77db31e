"""Q functions as roles: adapters on the shared base, without an output layer per role.

With pi_ref the reference and pi_q the next-token distribution of a Q role through the frozen output layer:

    Q(s, a) = b(s) + c (log pi_q(a|s) - log pi_ref(a|s)),   c = 0.25

Any Q has this form, with pi_q = pi_ref exp((Q - b) / c) and b(s) = c log sum_a pi_ref(a|s) exp(Q(s, a) / c), its soft value
at temperature c (the identity of Rafailov et al. 2024, section 4, https://arxiv.org/abs/2404.12358). The two terms have
separate roles, as in a dueling network (Wang et al. 2016, https://arxiv.org/abs/1511.06581): learning state values moves the
hidden states far, and in a shared adapter it would distort the next-token distribution too. b is the same for all tokens and
cancels in decoding, so its role can read the evaluator's prompt.

The value of a sampled token is a log-prob and needs no logits. A sum over the vocabulary is computed in chunks of positions,
without gradient.

Shapes: B replies, R reply tokens, N unmasked tokens, C of them per chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selfeval.algorithms.masked import masked_sum, zero_padding
from selfeval.algorithms.q_learning import kl_soft_value
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import slices, token_logprobs
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
    "role_loss",
    "soft_values",
    "state_values",
    "values_above_state",
    "values_of_role",
]

Q_ROLES, VALUE_ROLE = ("q-0", "q-1"), "q-state"
TARGET_ROLES = {role: f"{role}-target" for role in (*Q_ROLES, VALUE_ROLE)}
"""The target network of each role: a frozen copy that `polyak_update` moves."""

UNIT = 0.25
"""The coefficient c: whitened reward per nat of log-ratio between a Q role and the reference."""

_CHUNK_BYTES, _HELD = 64 << 20, 8
"""Bytes of a chunk of positions, and the number of fp32 tensors `[C, V]` that are alive at once."""

Compute = Callable[[Replayed], Tensor]


def add_q_roles(context: LearnerContext) -> None:
    """Add two Q roles, the role of the state values, and a target network of each. All values start at 0.

    The Q roles are initialised from the policy, which equals the reference. If that is the bare base, the random halves of
    their adapters differ. In either case the two are trained on minibatches in different orders.
    """
    backbone = context.backbone
    start = None if backbone.roles.is_bare(POLICY) else POLICY
    for number, role in enumerate(Q_ROLES):
        backbone.roles.add(role, seed=(context.seed + number) % 2**31, copy_of=start)
    add_value_role(context, VALUE_ROLE)
    for role, target in TARGET_ROLES.items():
        backbone.roles.add(target, copy_of=role, head=role in backbone.roles.heads, trainable=False)


def add_value_role(context: LearnerContext, role: str) -> None:
    """Add a role for state values unless it exists: a copy of the adapter of `context.evaluator`, if set, with a zero head."""
    backbone = context.backbone
    if role not in backbone.roles.names:
        backbone.roles.add(role, copy_of=context.evaluator, head=True)
    for parameter in backbone.roles.heads[role].parameters():
        # The evaluator's head predicts raw scores; state values are in units of whitened reward and start at 0.
        nn.init.zeros_(parameter)


@torch.no_grad()
def polyak_update(backbone: Backbone, share: float) -> None:
    """Update the target networks by Polyak averaging: target <- target + share (role - target).

    Lillicrap et al. 2016, algorithm 1, https://arxiv.org/abs/1509.02971.
    """
    for role, target in TARGET_ROLES.items():
        for ours, theirs in zip(
            backbone.roles.parameters(target).values(), backbone.roles.parameters(role).values(), strict=True
        ):
            ours.lerp_(theirs, share)


def log_ratios(context: LearnerContext, pool: Replayed) -> Tensor:
    """Compute c (log pi_q - log pi_ref) of the sampled tokens for the acting role; `[B, R]`, garbage where mask is False."""
    backbone, batch, temperature = context.backbone, pool.policy_batch, context.config.temperature
    hidden_BRD = reply_hidden(backbone, batch)
    found = token_logprobs(backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature)
    return UNIT * (found.logprobs - pool.ref_logprobs)


def state_values(context: LearnerContext, role: str, pool: Replayed) -> Tensor:
    """Compute state values before each token by the head of the acting role; `[B, R]`, garbage where the mask is False."""
    return context.backbone.score(role, reply_hidden(context.backbone, pool.critic_batch))


def chosen_token_values(context: LearnerContext, role: str, pool: Replayed) -> Tensor:
    """Compute the outputs of a Q role (`log_ratios`) or of a role with a head at the chosen tokens; `[B, R]`, no gradient."""
    return _in_parts(context, pool, 1, lambda part: values_of_role(context, role, part)[None])[0]


def values_of_role(context: LearnerContext, role: str, part: Replayed) -> Tensor:
    """Compute the values of the chosen tokens of a micro-batch by a role, `[B, R]`, garbage where the mask is False."""
    with context.backbone.acting_as(role):
        return state_values(context, role, part) if role in context.backbone.roles.heads else log_ratios(context, part)


def soft_values(context: LearnerContext, pool: Replayed, beta: float) -> tuple[Tensor, Tensor]:
    """Compute soft state values and the Q of the chosen tokens by the target networks, with the minimum of the twins.

    V(s) = beta log sum_a pi_ref(a|s) exp(min_k Q_k(s, a) / beta)

    Returns:
        V and Q, each `[B, R]`, no gradient, 0 where the mask is False.
    """
    above = _in_parts(context, pool, 2, lambda part: values_above_state(context, part, beta))
    states_BR = zero_padding(chosen_token_values(context, TARGET_ROLES[VALUE_ROLE], pool), pool.mask)
    return states_BR + above[0], states_BR + above[1]


def values_above_state(context: LearnerContext, part: Replayed, beta: float) -> Tensor:
    """Compute V - b and Q - b of a micro-batch, `[2, B, R]`, without gradient."""
    backbone, temperature = context.backbone, context.config.temperature
    batch, mask, hidden = part.policy_batch, part.mask, []
    for role in (REFERENCE, *(TARGET_ROLES[twin] for twin in Q_ROLES)):
        with backbone.acting_as(role):
            # Hidden states are small and kept for the three roles; the logits are computed per chunk.
            hidden.append(reply_hidden(backbone, batch)[mask])
    values_2N = torch.zeros(2, len(hidden[0]), device=mask.device)
    size = max(1, _CHUNK_BYTES // (4 * _HELD * backbone.output_head.vocabulary))
    for chunk in slices(len(hidden[0]), size, on_shapes=values_2N.is_meta):
        ref_CV, *roles_CV = (torch.log_softmax(backbone.logits(h[chunk]) / temperature, -1) for h in hidden)
        # UNIT > 0, so the smaller log-prob is the smaller Q. b(s) is common to both twins and added by `soft_values`.
        lower_CV = UNIT * (torch.minimum(*roles_CV) - ref_CV)
        # A sum over the vocabulary, which is why the positions are processed in chunks.
        values_2N[0, chunk] = kl_soft_value(lower_CV, ref_CV, beta=beta)
        values_2N[1, chunk] = lower_CV.gather(1, batch.reply_BR[mask][chunk, None])[:, 0]
    found = torch.zeros(2, *mask.shape, device=mask.device)
    found[:, mask] = values_2N
    return found


@torch.no_grad()
def _in_parts(context: LearnerContext, pool: Replayed, count: int, compute: Compute) -> Tensor:
    """Apply `compute` to micro-batches of replies and concatenate the results to `[count, B, R]`."""
    result = torch.zeros(count, *pool.mask.shape, device=pool.mask.device)

    def of_group(group: list[int]) -> Tensor:
        return compute(pool.rows(torch.tensor(group, device=result.device)))

    budget, numbers = context.backbone.budget, pool.policy_batch.prompt_numbers(context.backbone)
    for group, found in budget.in_groups(Phase.SCORE, _sizes(pool), context.batch_tokens, of_group, numbers):
        result[:, torch.tensor(group, device=result.device)] = found.to(result)
    return result


def _sizes(pool: Replayed) -> list[int]:
    """Return the tokens of each reply with the longer of its two prompts."""
    sizes: list[int] = torch.maximum(pool.policy_batch.attention_BT.sum(-1), pool.critic_batch.attention_BT.sum(-1)).tolist()
    return sizes


def q_targets(
    rewards_BR: Tensor, taken_BR: Tensor, values_BR: Tensor, traces_BR: Tensor, mask_BR: Tensor, *, gamma: float
) -> Tensor:
    """Compute off-policy corrected targets of Q with eligibility traces.

    y_t = r_t + gamma (V_{t+1} + c_{t+1} (y_{t+1} - Q_{t+1})),   nothing after the last token

    The general operator of Munos et al. 2016, eq. 3 (https://arxiv.org/abs/1606.02647), with traces c: 0 is `td_target`,
    lambda is Q(lambda), lambda min(1, pi / mu) is their Retrace. If Q and V are exact, all corrections are 0 whichever policy
    sampled the tokens, so the fixed point does not depend on c. With Q = V = 0 and c = 1, y is the return.

    Args:
        rewards_BR: reward of each token, without a KL penalty.
        taken_BR: Q of the sampled tokens, no gradient.
        values_BR: V of the state before each token, no gradient.
        traces_BR: trace coefficient c of each token, in [0, 1].
        mask_BR: True at the reply tokens, which must be contiguous.
        gamma: discount per token, in [0, 1].

    Returns:
        Targets y `[B, R]` in units of reward, 0 where the mask is False.
    """
    rewards_BR, taken_BR, values_BR = (zero_padding(x_BR, mask_BR) for x_BR in (rewards_BR, taken_BR, values_BR))
    following_B, columns = torch.zeros_like(rewards_BR[:, 0]), []
    for t in reversed(range(rewards_BR.shape[1])):
        # From the last token backwards. Padding is on the right, so y is 0 until the last reply token is reached.
        y_B = torch.where(mask_BR[:, t], rewards_BR[:, t] + gamma * following_B, 0.0)
        following_B = values_BR[:, t] + traces_BR[:, t] * (y_B - taken_BR[:, t])
        columns.append(y_B)
    return torch.stack(columns[::-1], -1)


def role_loss(
    context: LearnerContext, role: str, rows: Replayed, targets_BR: Tensor, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute the loss of a role on a micro-batch, a weighted sum over its tokens; arguments as in `gradients`."""
    errors_BR = targets_BR - values_of_role(context, role, rows)
    return masked_sum(rows.weights * loss(errors_BR), rows.mask)


def gradients(
    context: LearnerContext, role: str, part: Replayed, targets_BR: Tensor, loss: Callable[[Tensor], Tensor]
) -> float:
    """Accumulate the gradient of a minibatch in one role and return the loss, a weighted mean over tokens.

    Args:
        context: shared context of policy learning.
        role: a Q role, or a role with a head.
        part: the minibatch.
        targets_BR: targets of the chosen tokens.
        loss: maps the error of each token (target minus output) to its loss.
    """
    backbone, parameters = context.backbone, list(context.backbone.roles.parameters(role).values())
    tokens = int(part.mask.sum())

    def of_group(group: list[int]) -> float:
        index = torch.tensor(group, device=part.mask.device)
        summed = role_loss(context, role, part.rows(index), targets_BR[index], loss)
        found = summed.item()
        # Last, because a group that runs out of memory is repeated.
        add_gradients(summed / tokens, parameters)
        return found

    numbers = part.policy_batch.prompt_numbers(backbone)
    groups = backbone.budget.in_groups(Phase.UPDATE, _sizes(part), context.batch_tokens, of_group, numbers)
    return sum(found for _, found in groups) / tokens
