"""Q functions that are roles: adapters on the one base, with a scalar head, and no output layer of their own.

With pi_ref the reference, pi_q what the role says of the next token through the frozen output layer, and b its head:

    Q(s, a) = b(s) + c (log pi_q(a|s) - log pi_ref(a|s)),   c = 0.25

Any Q can be written so, with pi_q = pi_ref exp((Q - b) / c) and b(s) = c log sum_a pi_ref(a|s) exp(Q(s, a) / c), its soft value
at temperature c (the identity of Rafailov et al. 2024, section 4, https://arxiv.org/abs/2404.12358). At the start the role says
what the reference says, and its head is 0: Q is 0. The value of a token that was drawn is a log-prob and costs no logits; where
a sum over the vocabulary is needed, it is made a few positions at a time, without gradient.

Shapes: B replies, R reply tokens, N tokens that count, C of them at a time, K roles, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfeval.algorithms.masked import masked_sum, zero_padding
from selfeval.algorithms.q_learning import huber_loss, kl_soft_value
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_hidden
from selfeval.training.gradients import add_gradients
from selfeval.training.replay import Replayed
from selfeval.training.setting import POLICY, REFERENCE, Setting

__all__ = [
    "TARGETS",
    "TWINS",
    "UNIT",
    "add_twins",
    "drawn_values",
    "follow",
    "lag",
    "lower_values",
    "q_gradients",
    "q_targets",
    "soft_values",
    "token_values",
]

TWINS, TARGETS = ("q-0", "q-1"), ("q-0-target", "q-1-target")

UNIT = 0.25
"""c: whitened reward per nat by which a Q role leads away from the reference."""

_CHUNK_BYTES, _HELD = 64 << 20, 8
"""Memory of a chunk of positions, and how many times the vocabulary it holds in fp32."""


def add_twins(setting: Setting) -> None:
    """Adds two Q roles that start at 0, and a frozen copy of each that will follow it.

    They say what the policy says, which is the reference. Where that is the bare base they differ in the random half of their
    adapters; in any case each goes through the replies in an order of its own.
    """
    backbone = setting.backbone
    start = None if backbone.is_bare(POLICY) else POLICY
    for number, (role, target) in enumerate(zip(TWINS, TARGETS, strict=True)):
        backbone.add_role(role, seed=(setting.seed + number) % 2**31, copy_of=start, head=True)
        backbone.add_role(target, copy_of=role, head=True, trainable=False)


@torch.no_grad()
def follow(backbone: Backbone, share: float) -> None:
    """Moves each target by a share of what parts it from its Q role: Polyak averaging of the weights.

    Lillicrap et al. 2016, algorithm 1, https://arxiv.org/abs/1509.02971.
    """
    for role, target in zip(TWINS, TARGETS, strict=True):
        for ours, theirs in zip(backbone.parameters(target).values(), backbone.parameters(role).values(), strict=True):
            ours.lerp_(theirs, share)


def token_values(setting: Setting, role: str, pool: Replayed) -> tuple[Tensor, Tensor]:
    """The two parts of Q of the drawn tokens by `role`, which must be acting: b, and the rest.

    Returns:
        Each `[B, R]`, differentiable, anything where the mask is False.
    """
    backbone, batch = setting.backbone, pool.policy_batch
    hidden_BRD = reply_hidden(backbone, batch)
    temperature = setting.config.temperature
    logprobs_BR = token_logprobs(backbone, hidden_BRD, batch.reply_BR, batch.mask_BR, temperature=temperature).logprobs
    return backbone.score(role, hidden_BRD), UNIT * (logprobs_BR - pool.ref_logprobs)


def drawn_values(setting: Setting, role: str, pool: Replayed) -> Tensor:
    """Q of the drawn tokens by one role; `[B, R]`, no gradient."""
    with setting.backbone.acting_as(role):
        return _in_parts(setting, pool, 1, lambda part: torch.stack(token_values(setting, role, part)).sum(0)[None])[0]


def lower_values(setting: Setting, pool: Replayed) -> Tensor:
    """Q of the drawn tokens by the target roles, the lower of the two; `[B, R]`, no gradient."""
    return torch.minimum(*(drawn_values(setting, role, pool) for role in TARGETS))


def soft_values(setting: Setting, pool: Replayed, beta: float) -> tuple[Tensor, Tensor]:
    """Value of each state, and Q of the drawn token, by the target roles: the lower of the two for every token.

    V(s) = beta log sum_a pi_ref(a|s) exp(min_k Q_k(s, a) / beta)

    Returns:
        V and Q, each `[B, R]`, no gradient, 0 where the mask is False.
    """
    found = _in_parts(setting, pool, 2, lambda part: _soft_values(setting, part, beta))
    return found[0], found[1]


def _soft_values(setting: Setting, part: Replayed, beta: float) -> Tensor:
    backbone, temperature = setting.backbone, setting.config.temperature
    batch, mask, hidden = part.policy_batch, part.mask, {}
    for role in (REFERENCE, *TARGETS):
        with backbone.acting_as(role):
            hidden[role] = reply_hidden(backbone, batch)[mask]
    values_2N = torch.zeros(2, int(mask.sum()), device=mask.device)
    size = max(1, _CHUNK_BYTES // (4 * _HELD * backbone.output_head.vocabulary))
    for start in range(0, values_2N.shape[1], size):
        chunk = slice(start, start + size)
        ref_CV, *roles_CV = (torch.log_softmax(backbone.logits(h[chunk]) / temperature, -1) for h in hidden.values())
        heads_C1 = (backbone.score(role, hidden[role][chunk])[:, None] for role in TARGETS)
        lower_CV = torch.minimum(*(b + UNIT * (logprobs - ref_CV) for b, logprobs in zip(heads_C1, roles_CV, strict=True)))
        values_2N[0, chunk] = kl_soft_value(lower_CV, ref_CV, beta=beta)
        values_2N[1, chunk] = lower_CV.gather(1, batch.reply_BR[mask][chunk, None])[:, 0]
    found = torch.zeros(2, *mask.shape, device=mask.device)
    found[:, mask] = values_2N
    return found


@torch.no_grad()
def _in_parts(setting: Setting, pool: Replayed, count: int, compute: Callable[[Replayed], Tensor]) -> Tensor:
    """`compute` on micro-batches of replies, put together as `[count, B, R]`."""
    result = torch.zeros(count, *pool.mask.shape, device=pool.mask.device)

    def fill(group: list[int]) -> None:
        index = torch.tensor(group, device=result.device)
        result[:, index] = compute(pool.rows(index))

    sizes = pool.policy_batch.attention_BT.sum(-1).tolist()
    for _ in setting.backbone.budget.in_groups(Phase.SCORE, sizes, setting.batch_tokens, fill):
        pass
    return result


def q_targets(
    rewards_BR: Tensor, taken_BR: Tensor, values_BR: Tensor, traces_BR: Tensor, mask_BR: Tensor, *, gamma: float
) -> Tensor:
    """Compute what Q is to learn: the one-step target, and what later steps showed it to have missed.

    y_t = r_t + gamma (V_{t+1} + c_{t+1} (y_{t+1} - Q_{t+1})),   nothing after the last token

    The general operator of Munos et al. 2016, eq. 3 (https://arxiv.org/abs/1606.02647), with traces c: 0 gives `td_target`,
    lambda gives Q(lambda), lambda min(1, pi / mu) gives their Retrace. Where Q and V are exact every correction is 0, whoever
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


def q_gradients(setting: Setting, role: str, part: Replayed, *, behind: float = 0.0) -> dict[str, float]:
    """Adds the gradient of a minibatch's weighted Huber loss to the weights of one Q role; means over its tokens.

    loss = mean of w (Huber(y - b - [r]) + (1 - pi_ref) Huber(y - behind - [b] - r)),   Q = b + r, [] without gradient

    The log-ratios r learn where there is a choice: what a state is worth is for b to say. Otherwise r would say that a state is
    bad by the only token that can follow, and hand its probability to tokens that no reply ever had. They learn from errors
    less their mean, as advantages are centred for a policy gradient: while all values lag behind rising rewards, r would
    imitate whatever is drawn. Neither moves the optimum, where all errors are 0.

    Args:
        role: it is made to act.
        part: the minibatch.
        behind: mean of y - Q by this role over the replies that the minibatch is of.
    """
    backbone, parameters = setting.backbone, list(setting.backbone.parameters(role).values())
    tokens = int(part.mask.sum())

    def of_group(group: list[int]) -> tuple[float, float]:
        rows = part.rows(torch.tensor(group, device=part.mask.device))
        b_BR, r_BR = token_values(setting, role, rows)
        of_b_BR = huber_loss(rows.targets - b_BR - r_BR.detach())
        of_r_BR = huber_loss(rows.targets - behind - b_BR.detach() - r_BR)
        found = masked_sum(rows.weights * of_b_BR, rows.mask).item(), masked_sum(b_BR + r_BR, rows.mask).item()
        choice_BR = 1 - rows.ref_logprobs.exp()
        add_gradients(masked_sum(rows.weights * (of_b_BR + choice_BR * of_r_BR), rows.mask) / tokens, parameters)
        return found

    sizes = part.policy_batch.attention_BT.sum(-1).tolist()
    with backbone.acting_as(role):
        groups = [found for _, found in backbone.budget.in_groups(Phase.UPDATE, sizes, setting.batch_tokens, of_group)]
    loss, values = (sum(column) / tokens for column in zip(*groups, strict=True))
    return {"q_loss": loss, "q": values}


def lag(setting: Setting, role: str, pool: Replayed) -> float:
    """How far the values of one Q role lie below their targets: weighted mean of y - Q over the tokens."""
    errors_BR = pool.weights * (pool.targets - drawn_values(setting, role, pool))
    return float(masked_sum(errors_BR, pool.mask) / masked_sum(pool.weights, pool.mask).clamp_min(1e-6))
