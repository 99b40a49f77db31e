"""The model of a run: its base and its prompts, loaded once for its evaluator, its policy and its judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates
from selfeval.records import Question
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.runs.reader import RunReader, backbone_config
from selfeval.runs.reply_limit import LIMIT_FILE, reply_limit
from selfeval.runs.templates import templates_of_run
from selfeval.store.remote.places import local_run

__all__ = ["RunModel", "TrainedModel", "described"]


@dataclass(frozen=True)
class RunModel:
    """The base model and the prompts of a run. Roles are loaded onto the base on demand.

    Attributes:
        reader: files of the run.
        backbone: the base, in the precision of the run.
        templates: the prompts that the run used, even if the model folder has changed since.
    """

    reader: RunReader
    backbone: Backbone
    templates: Templates

    @classmethod
    def load(cls, reader: RunReader, *, trust_remote_code: bool = False) -> RunModel:
        """Load the base and the prompts of a run.

        Args:
            reader: reader of the run, or of one of its rounds.
            trust_remote_code: run code that comes with the base. Default: False.

        Raises:
            ModelError: the base cannot be loaded.
            RunFolderError: the prompts of the run are missing or changed.
        """
        config, settings = reader.config, backbone_config(reader.config, reader.run)
        # A run folder may come from an untrusted source, so it must not choose where offloaded weights are written.
        settings = settings.model_copy(update={"placement": settings.placement.model_copy(update={"folder": ""})})
        backbone = Backbone.load(config.model, settings, trust_remote_code=trust_remote_code)
        return cls(reader, backbone, templates_of_run(reader.folder, backbone.loaded.tokenizer, config.verdicts))

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return self.reader.config

    @property
    def roles(self) -> Path:
        """The folder of the run's roles."""
        return self.reader.roles_folder

    @property
    def reply_limit(self) -> int:
        """Token limit of the run's replies."""
        self.reader.check([self.reader.folder / LIMIT_FILE])
        return reply_limit(self.config.replies, self.reader.folder)

    @property
    def thinking(self) -> ThinkingTokens | None:
        """Markers and limit of the thinking before a reply; None if the model has no tokens for it."""
        return self.templates.thinking(self.config.replies.max_thinking_tokens)

    def reference_request(self, question: Question) -> Request:
        """Return the request of the base's greedy reply to a question."""
        return Request(self.templates.reply_prompt(question), temperature=0.0)

    def reference_answers(self, questions: Sequence[Question]) -> list[str]:
        """Return the base's greedy reply to each question, which some grade templates show to the evaluator."""
        requests = [self.reference_request(question) for question in questions]
        limit, batch_size = self.reply_limit, self.config.backbone.rollout_batch_size
        with self.backbone.acting_as(BASE):
            rollouts = generate(
                self.backbone, requests, max_new_tokens=limit, seed=0, batch_size=batch_size, thinking=self.thinking
            )
        return [self.templates.text(rollout.reply_ids) for rollout in rollouts]


class TrainedModel(ABC):
    """Base class of the trained models of a run.

    Args:
        model: base and prompts of the run, onto which the roles are loaded.
    """

    def __init__(self, model: RunModel) -> None:
        self._model = model

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Self:
        """Load the base, the trained roles and the prompts of a run, in the run's precision.

        Args:
            folder: folder or URL of the run, or of one of its rounds (`RUN/rounds/02`).
            trust_remote_code: run code that comes with the base. Default: False.

        Raises:
            RunFolderError: the run has not trained this model yet, or one of its files is damaged.
            ModelError: the base cannot be loaded.
        """
        # Files first: a missing role is reported before the base is loaded, which may take minutes.
        reader = RunReader(local_run(folder))
        cls.check(reader)
        return cls(RunModel.load(reader, trust_remote_code=trust_remote_code))

    @staticmethod
    @abstractmethod
    def check(reader: RunReader) -> None:
        """Refuse a run without complete files of this model, without loading anything.

        Raises:
            RunFolderError: the model is not trained yet, or one of its files is damaged.
        """

    def __repr__(self) -> str:
        return described(type(self).__name__, self._model.reader.folder, self._model.backbone)


def described(kind: str, source: str | Path, backbone: Backbone) -> str:
    """Return a representation that names what was loaded, its precision and its device."""
    return f"{kind}({str(source)!r}, {backbone.loaded.precision} on {backbone.loaded.device})"
