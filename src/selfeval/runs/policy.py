"""The trained policy of a run, with the value roles that guide its sampling if the learner did not change its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, overload

from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.errors import InputError, RunFolderError
from selfeval.links import stays_inside
from selfeval.records import Question
from selfeval.rollout.engine import generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request
from selfeval.runs.conversations import AnyQuestion, check_conversations, questions_from
from selfeval.runs.model import RunModel, TrainedModel
from selfeval.runs.reader import RunReader
from selfeval.store import read_object
from selfeval.texts import shortened, visible
from selfeval.training.context import POLICY

__all__ = ["GUIDE", "Policy", "check_sampling", "load_policy"]

GUIDE = "guide.json"
"""File in the policy's folder: the value roles that guide its sampling, if the learner did not change its weights."""


def _read_guide(roles: Path) -> Guide | None:
    """Return the guidance, or None without one.

    Raises:
        RunFolderError: the file is damaged.
    """
    noted = roles / POLICY / GUIDE
    if not noted.is_file():
        return None
    values = read_object(noted, "roles", "strength")
    names, strength = values["roles"], values["strength"]
    # A role is a folder next to the policy's.
    named = isinstance(names, list) and names and all(stays_inside(name) and "/" not in name for name in names)
    if not named or isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < inf:
        found = shortened(visible(json.dumps(values, ensure_ascii=False)))
        raise RunFolderError(
            f'{noted} is damaged: expected "roles", a list of names of roles, and "strength", a number above 0; got '
            f"{found}. Restore a backup of {roles / POLICY}, or move it away and rerun the same command"
        )
    return Guide(tuple(names), float(strength))


def load_policy(backbone: Backbone, roles: Path) -> Guide | None:
    """Load the policy and its guiding roles from a folder of roles, except those that are already loaded.

    Returns:
        The value guidance to apply when sampling, or None.
    """
    guide = _read_guide(roles)
    for role in (POLICY, *(guide.roles if guide else ())):
        if role not in backbone.roles.names:
            load_role(backbone, role, roles / role)
    return guide


class Policy(TrainedModel):
    """The trained policy of a run, loaded once for any number of questions. Use `Policy.load`.

    Example:
        >>> policy = Policy.load("runs/first")
        >>> len(policy.reply("Tom has 3 pens. He buys 2 more. How many pens does Tom have now?", n=4))
        4
    """

    def __init__(self, model: RunModel) -> None:
        super().__init__(model)
        self._guide = load_policy(model.backbone, model.roles)

    @staticmethod
    def check(reader: RunReader) -> None:
        """Refuse a run without a complete policy, without loading anything.

        Raises:
            RunFolderError: the run has no policy yet, or one of its files is damaged.
        """
        roles = reader.roles_folder
        if not (roles / POLICY / "role.json").is_file():
            raise RunFolderError(f"{reader.folder} has no policy yet; `selfeval run` trains it (stage policy)")
        reader.check([roles / POLICY])
        guide = _read_guide(roles)
        reader.check([roles / role for role in guide.roles] if guide else [])

    @overload
    def reply(
        self,
        questions: str | list[Mapping[str, Any]] | list[dict[str, str]],
        n: int = ...,
        *,
        seed: int = ...,
        temperature: float | None = ...,
        top_p: float | None = ...,
        max_new_tokens: int | None = ...,
    ) -> list[str]: ...

    @overload
    def reply(
        self,
        questions: list[str] | list[AnyQuestion] | list[list[dict[str, str]]] | tuple[AnyQuestion, ...],
        n: int = ...,
        *,
        seed: int = ...,
        temperature: float | None = ...,
        top_p: float | None = ...,
        max_new_tokens: int | None = ...,
    ) -> list[list[str]]: ...

    def reply(
        self,
        questions: AnyQuestion | Sequence[AnyQuestion],
        n: int = 1,
        *,
        seed: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str] | list[list[str]]:
        """Sample replies, without the thinking of models that think.

        Args:
            questions: one question, or several. Each is a text, or a conversation: a list of messages with `role` and `content`
                that ends with a message of the user.
            n: number of replies per question. Default: 1.
            seed: sampling seed; the same call returns the same replies. Default: 0.
            temperature: Optional. Sampling temperature, at least 0; 0 is greedy (default: `evaluation.temperature` of the run).
            top_p: Optional. Nucleus of the sampling, above 0 and at most 1 (default: `evaluation.top_p` of the run).
            max_new_tokens: Optional. Token limit per reply (default: that of the run's replies).

        Returns:
            The n replies to one question; for several questions, one list per question.

        Raises:
            InputError: a question is empty, a conversation is malformed or cannot be formatted by the chat template, or a
                number is out of its range.
            LoopError: a prompt is longer than the model's context.

        Example:
            >>> policy = Policy.load("runs/first")
            >>> [len(replies) for replies in policy.reply(["What is 1 + 1?", "What is 2 + 2?"], n=2, temperature=0)]
            [2, 2]
        """
        asked, is_single = questions_from(questions)
        # As in the evidence of the run.
        evaluated = self._model.config.evaluation
        temperature = evaluated.temperature if temperature is None else temperature
        top_p = evaluated.top_p if top_p is None else top_p
        limit = self._model.reply_limit if max_new_tokens is None else max_new_tokens
        check_sampling(temperature, top_p, limit, n)
        check_conversations(self._model.templates, asked)
        texts = self._sample(asked, n, seed, (temperature, top_p), limit)
        grouped = [texts[i : i + n] for i in range(0, len(texts), n)]
        return grouped[0] if is_single else grouped

    def _sample(self, questions: Sequence[Question], n: int, seed: int, sampling: tuple[float, float], limit: int) -> list[str]:
        model, prompts = self._model, [self._model.templates.reply_prompt(question) for question in questions]
        # Replies to the same question are adjacent; `reply` cuts the list into groups of n.
        requests = [Request(prompt, *sampling) for prompt in prompts for _ in range(n)]
        with model.backbone.acting_as(POLICY):
            rollouts = generate(
                model.backbone,
                requests,
                max_new_tokens=limit,
                seed=seed,
                batch_size=model.config.backbone.rollout_batch_size,
                guide=self._guide,
                thinking=model.thinking,
            )
        return [model.templates.text(rollout.reply_ids) for rollout in rollouts]


def check_sampling(temperature: float, top_p: float, limit: int, n: int = 1) -> None:
    """Check the numbers that replies are sampled with.

    Args:
        temperature: sampling temperature, at least 0.
        top_p: nucleus, above 0 and at most 1.
        limit: token limit of a reply, at least 1.
        n: number of replies, at least 1. Default: 1.

    Raises:
        InputError: one of them is out of its range.
    """
    for name, value, least in (("n", n, 1), ("temperature", temperature, 0), ("max_new_tokens", limit, 1)):
        # Not `value < least`, which is False for NaN.
        if not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
