"""The models of a run as the server offers them: one base, the roles that reply on it, and the evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import load_role
from selfeval.rollout.guide import Guide
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.model import RunModel
from selfeval.runs.policy import Policy, load_policy
from selfeval.runs.reader import RunReader
from selfeval.runs.reply_limit import LIMIT_FILE, reply_limit
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR

__all__ = ["SCORER", "ServedRun", "TokenTexts"]

SCORER = "evaluator"
"""Name of the evaluator among the models."""


class TokenTexts(dict[int, str]):
    """The text of each token by its id, decoded when it is first read.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = text = str(self._tokenizer.decode([token]))
        return text


@dataclass(frozen=True)
class ServedRun:
    """The models of a run, loaded on one base.

    Attributes:
        model: base and prompts of the run.
        guides: the roles that reply, with the guide of each: the policy (if it is trained), the base, and other roles without a
            head.
        evaluator: the evaluator; None if the run has not trained one.
        reply_limit: token limit of the run's replies with their thinking; None if the run has not decided it yet.
    """

    model: RunModel
    guides: Mapping[str, Guide | None]
    evaluator: Evaluator | None
    reply_limit: int | None

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> ServedRun:
        """Load the base, and every role of the run that replies or scores.

        Args:
            folder: folder of the run, or of one of its rounds.
            trust_remote_code: run code that comes with the base. Default: False.

        Raises:
            RunFolderError: the folder is not a run, or a file of a role or the token limit of replies is damaged.
            ModelError: the base cannot be loaded.
            InputError: the model continues images or other input that the server cannot read.
        """
        reader = RunReader(folder)
        has_policy, has_evaluator = _has_file(reader, POLICY, "role.json"), _has_file(reader, EVALUATOR, "evaluator.json")
        if has_policy:
            Policy.check(reader)
        if has_evaluator:
            Evaluator.check(reader)
        limit = _reply_limit(reader)
        model = RunModel.load(reader, trust_remote_code=trust_remote_code)
        guides: dict[str, Guide | None] = {POLICY: load_policy(model.backbone, model.roles)} if has_policy else {}
        guides[BASE] = None
        for role in _other_roles(reader):
            if role not in model.backbone.roles.names:
                reader.check([model.roles / role])
                load_role(model.backbone, role, model.roles / role)
            guides.setdefault(role, None)
        return cls(model, guides, Evaluator(model) if has_evaluator else None, limit)

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return [*self.guides, *([SCORER] if self.evaluator else [])]

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Texts of single tokens, for log-probs."""
        return TokenTexts(self.model.templates.tokenizer)

    @cached_property
    def longest_token(self) -> int:
        """Number of characters of the longest entry of the vocabulary."""
        return max(map(len, self.model.templates.tokenizer.get_vocab()))

    @property
    def context(self) -> int | None:
        """Context of the model in tokens; None if it is not limited."""
        return self.model.backbone.loaded.context_length


def _reply_limit(reader: RunReader) -> int | None:
    """Return the token limit of the run's replies with their thinking; None before the stage replies has decided it."""
    config, path = reader.config.replies, reader.folder / LIMIT_FILE
    reader.check([path])  # a file that was lost after a finished stage is an error, not a limit to be decided
    if config.max_new_tokens == "auto" and not path.is_file():
        return None
    return reply_limit(config, reader.folder) + (config.max_thinking_tokens or 0)


def _has_file(reader: RunReader, role: str, name: str) -> bool:
    return (reader.roles_folder / role / name).is_file()


def _other_roles(reader: RunReader) -> list[str]:
    """Return the roles in the folder that have no head, so they predict tokens, except the policy."""
    folders = sorted(reader.roles_folder.glob("*/role.json")) if reader.roles_folder.is_dir() else []
    names = [path.parent.name for path in folders]
    return [name for name in names if name != POLICY and not _has_file(reader, name, "head.safetensors")]
