"""No public function broadcasts a tensor with an axis too many: [N, 1] instead of [N] silently yields N x N numbers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import selfeval.algorithms
from selfeval.algorithms.mdp import FiniteMDP, TokenMDP

B, T, A, S, V = 3, 4, 5, 3, 2

MDP = FiniteMDP(torch.full((S, A, S), 1 / S).double(), torch.rand(S, A).double(), torch.full((S,), 1 / S).double(), 0.9)
TOKENS = TokenMDP(V, 2, torch.zeros(3, V))

VALUES: dict[str, Any] = {
    # By parameter name; the suffix of a name is its shape, and the exceptions are named in full.
    "_BT": lambda: torch.rand(B, T) - 1.5,
    "_B": lambda: torch.rand(B) - 1.5,
    "_N": lambda: torch.rand(B) - 1.5,
    "_KN": lambda: torch.rand(2, B),
    "_A": lambda: torch.randn(B, A).log_softmax(-1),
    "_SA": lambda: torch.full((S, A), 1 / A).double(),
    "_S": lambda: torch.rand(S).double(),
    "_PV": lambda: torch.zeros(3, V).log_softmax(-1),
    "mask_BT": lambda: torch.ones(B, T).bool(),
    "dones_BT": lambda: torch.zeros(B, T).bool(),
    "groups_B": lambda: torch.tensor([0, 0, 1]),
    "lengths_B": lambda: torch.tensor([2, 3, 4]),
    "label_N": lambda: torch.full((B,), 0.9),
    "desirable_N": lambda: torch.tensor([True, False, True]),
    "terminal_rewards_N": lambda: torch.rand(V**2),
    "tokens_BT": lambda: torch.zeros(B, 2).long(),
    "baseline": lambda: torch.tensor(0.5),
    "log_alpha": lambda: torch.tensor(0.5),
    "alpha": lambda: torch.tensor(0.5),
    "margin": lambda: torch.rand(B),
    "rewards": lambda: torch.rand(B),
    "terminated": lambda: torch.zeros(B).bool(),
    "next_values": lambda: torch.rand(B),
    "actions": lambda: torch.tensor([0, 1, 2]),
    "target": lambda: torch.rand(B),
    "values": lambda: torch.rand(B),
    "x": lambda: torch.rand(B),
    "entropies": lambda: torch.rand(B),
    "errors": lambda: torch.rand(B),
    "logits": lambda: torch.rand(B, A),
    "logits_p": lambda: torch.rand(B, A),
    "logits_q": lambda: torch.rand(B, A),
}

NUMBERS: dict[str, Any] = {
    "gamma": 0.9, "lam": 0.9, "n": 2, "beta": 0.1, "clip": 0.2, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0,
    "max_length": 10, "buffer": 5, "mode": "token_mean", "per": "reply", "expectile": 0.7, "target_entropy": 0.5,
    "flip_rate": 0.1, "weight": 0.5, "limit": 2.0, "mdp": MDP, "vocabulary": V, "horizon": 2, "how": "min",
}  # fmt: skip

ONE_TENSOR = {
    # Each works alike on a tensor of any shape, or on one with any leading axes: there is nothing to line up.
    "categorical_entropy", "expectile_loss", "huber_loss", "soft_value", "overlong_penalty", "limit_exponent", "ipo_loss",
    "hinge_loss", "robust_dpo_loss", "aggregation_weights", "combined_score", "step_progress", "hard_labels",
}  # fmt: skip

ELSEWHERE = {
    "masked": {"at_least_float32", "check_same_shape", "check_scalar", "check_scalar_or_shape"},  # the checks themselves
    "controllers": None,  # floats
    "trust_region": None,  # vectors of parameters and functions: tests/algorithms/test_trust_region.py
    "mdp": {"FiniteMDP", "TokenMDP", "Solution", "TokenSolution"},
    "returns": {"VTrace"},
}

ANY_SHAPE = {("sac_temperature_loss", "entropies")}  # the other argument is one number


def public_functions() -> dict[str, Callable[..., Any]]:
    found = {}
    for module in pkgutil.iter_modules(selfeval.algorithms.__path__):
        names = importlib.import_module(f"selfeval.algorithms.{module.name}")
        skipped = ELSEWHERE.get(module.name, set())
        for name in names.__all__ if skipped is not None else ():
            if name not in skipped and callable(getattr(names, name)) and inspect.isfunction(getattr(names, name)):
                found[name] = getattr(names, name)
    return found


FUNCTIONS = public_functions()


def value_of(parameter: inspect.Parameter) -> Any:
    name = parameter.name
    if name in VALUES:
        return VALUES[name]()
    if name in NUMBERS:
        return NUMBERS[name]
    suffix = f"_{name.rpartition('_')[2]}"
    return VALUES[suffix]() if suffix in VALUES else None


def arguments_of(name: str) -> dict[str, Any]:
    """A valid call, with every optional tensor given."""
    arguments = {}
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        value = value_of(parameter)
        if isinstance(value, Tensor) or parameter.default is inspect.Parameter.empty:
            assert value is not None, f"no sample value for {name}({parameter.name}): add one to VALUES or NUMBERS"
            arguments[parameter.name] = value
    if name in ("ipo_loss", "hinge_loss", "dpo_loss", "robust_dpo_loss"):
        arguments["margin_N"] = torch.rand(B)
    if arguments.get("mdp") is MDP and any(key.endswith(("_PV", "tokens_BT")) for key in arguments):
        arguments["mdp"] = TOKENS
    if name == "solve_token_mdp":
        arguments["mdp"] = TOKENS
    return arguments


CASES = [
    (name, key)
    for name in FUNCTIONS
    if name not in ONE_TENSOR
    for key, value in arguments_of(name).items()
    if isinstance(value, Tensor) and (name, key) not in ANY_SHAPE
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_sample_calls_are_valid(name: str) -> None:
    FUNCTIONS[name](**arguments_of(name))


@pytest.mark.parametrize(("name", "key"), CASES)
def test_an_axis_too_many_is_refused(name: str, key: str) -> None:
    arguments = arguments_of(name)
    arguments[key] = arguments[key].expand(B)[:, None] if not arguments[key].dim() else arguments[key][..., None]
    with pytest.raises(ValueError, match=r"shape|must be|rewards \[|\[members, replies\]"):
        FUNCTIONS[name](**arguments)


def test_the_three_that_gave_n_by_n_are_among_the_cases() -> None:
    assert {("bradley_terry_loss", "margin"), ("kto_loss", "baseline"), ("sac_temperature_loss", "log_alpha")} <= set(CASES)
    assert len(CASES) > 130


def _float_arguments(name: str) -> list[str]:
    """Return the hyperparameters of type float, whether or not a sample call passes them."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return [p.name for p in parameters if "float" in str(p.annotation) and "Tensor" not in str(p.annotation)]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in FUNCTIONS for key in _float_arguments(name)])
def test_a_hyperparameter_is_one_number(name: str, key: str) -> None:
    """A tensor of any axes in the place of a float would broadcast against the batch."""
    for shape in ((B, 1), (1, 1), (T,)):
        with pytest.raises((ValueError, TypeError)):
            FUNCTIONS[name](**{**arguments_of(name), key: torch.full(shape, float(NUMBERS.get(key, 0.5)))})
