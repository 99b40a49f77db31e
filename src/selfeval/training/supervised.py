"""The training loop of the evaluator and of tuning: AdamW with warmup and decay, checkpoints, exact resuming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from selfeval.backbone.roles import Backbone
from selfeval.errors import LoopError, NotFiniteError
from selfeval.training.checkpoint import Checkpoints, role_optimizer
from selfeval.training.gradient_accumulation import clip_gradients, sum_gradients
from selfeval.training.held_out_loss import HeldOutLoss
from selfeval.training.schedules import warmup_and_decay

__all__ = ["SupervisedConfig", "train_supervised"]


class SupervisedConfig(Protocol):
    """Settings of the optimizer, with the meaning that they have in `EvaluatorConfig` and `TuningConfig`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def checkpoint_every(self) -> int: ...


def train_supervised(
    backbone: Backbone,
    role: str,
    gradients: Callable[[int], dict[str, float]],
    config: SupervisedConfig,
    checkpoints: Callable[[Mapping[str, Any]], Checkpoints],
    *,
    steps: int,
    log: Callable[[dict[str, float]], None],
    resumed: Callable[[int], None],
    save_last: bool,
    work: str,
    setting: str,
    held_out: HeldOutLoss | None = None,
) -> None:
    """Train a role for a number of steps, resuming from its last checkpoint if there is one.

    Args:
        backbone: has the role, with its initial weights.
        role: name of the role.
        gradients: adds the gradient of a step, numbered from 0, to the role's parameters; returns metrics. The batch must
            depend on the number only, so that resuming is exact.
        config: settings of the optimizer.
        checkpoints: factory of the checkpoint manager, called with the optimizer of the role.
        steps: number of steps in total.
        log: called after every step with step, metrics, gradient norm and learning rate; with a held-out loss, also before the
            first step, as step 0.
        resumed: called with the step of the checkpoint that training resumes from (0 for a new training).
        save_last: whether the last step writes a checkpoint too.
        work: name of the training in the error message.
        setting: name of the learning rate in the error message.
        held_out: Optional. Its loss is measured, and training ends with the weights of the best measurement. Default: training
            ends with the weights of the last step.

    Raises:
        LoopError: the loss or its gradient became NaN or infinite.
    """
    parameters = backbone.roles.parameters(role)
    optimizer = role_optimizer(parameters, config.learning_rate)
    keeper = checkpoints({role: optimizer})
    state = keeper.restore()
    first = int(state["step"]) if state else 0
    if state:
        backbone.load_training_state(state)
    resumed(first)
    if held_out is not None:
        held_out.begin(keeper, state)
        if first == 0:
            log(held_out.start())
    for step in range(first, steps):
        rate = config.learning_rate * warmup_and_decay(step, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            metrics = gradients(step)
            sum_gradients(parameters.values(), backbone.budget.processes)
            norm = clip_gradients(parameters, config.max_grad_norm)
        except NotFiniteError as error:
            raise LoopError(f"{work} diverged at step {step + 1}: {error}; lower {setting}") from error
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        # Before the save: the checkpoint copies the metrics, which must include this step.
        measured = {} if held_out is None else held_out.look(done, steps)
        log({"step": done, **metrics, "grad_norm": norm, "learning_rate": rate, **measured})
        # The last step is saved only on demand: a finished evaluator is written as a role at once.
        if (done % config.checkpoint_every == 0 and done < steps) or (save_last and done == steps):
            keeper.save(done, {**backbone.training_state(), **({} if held_out is None else held_out.state())})
    if held_out is not None:
        held_out.restore_best()
