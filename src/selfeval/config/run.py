"""The configuration of a whole run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from selfeval.config.backbone import BackboneConfig
from selfeval.config.chat import ChatConfig
from selfeval.config.embeddings import EmbeddingEndpointConfig, EmbeddingsConfig
from selfeval.config.fields import Count, Section
from selfeval.config.judges import REFEREE, EndpointConfig, JudgeRole
from selfeval.config.policy import PolicyConfig
from selfeval.config.scale import ScaleConfig
from selfeval.config.sections import (
    EvaluationConfig,
    EvaluatorConfig,
    PairsConfig,
    QuestionsConfig,
    RepliesConfig,
    TuningConfig,
    VerdictsConfig,
)
from selfeval.config.servers import ServerConfig
from selfeval.config.steps import StepsConfig

__all__ = ["RunConfig"]


class RunConfig(Section):
    """All settings of a run."""

    name: str = "run"
    """Name of the run. The output folder is runs/NAME unless --output is given."""
    model: str = ""
    """Model folder or hub id. A relative path in a recipe is relative to the recipe."""
    templates: str = ""
    """Folder of prompt templates. Optional; default: the model's own `templates/`, else the package's."""
    seeds: str = ""
    """Seeds file: JSON lines with a `question`, or plain text with one question per line."""
    domain: str | None = None
    """Optional. Name of an installed gold domain (entry point `selfeval.domains`), read by evaluation only."""
    gold: str = ""
    """Optional. File of gold answers, labels or unit tests, read by evaluation only (docs/guides/your-own-data.md)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random choice."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers to log curves to besides metrics/*.jsonl; each needs its package: pip install 'self-evaluator[tensorboard]'."""
    backbone: BackboneConfig = BackboneConfig()
    chat: ChatConfig = ChatConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    tuning: TuningConfig = TuningConfig()
    questions: QuestionsConfig = QuestionsConfig()
    replies: RepliesConfig = RepliesConfig()
    verdicts: VerdictsConfig = VerdictsConfig()
    pairs: PairsConfig = PairsConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    steps: StepsConfig = StepsConfig()
    policy: PolicyConfig = PolicyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scale: ScaleConfig = ScaleConfig()
    rounds: Count = 1
    """Number of rounds; each later round starts from the previous round's policy (docs/concepts/loop.md)."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if value.strip() in ("", ".", "..") or "/" in value or "\\" in value:
            raise ValueError("must be a folder name below runs/: not empty, no / or \\, not . or ..")
        return value

    @field_validator("policy")
    @classmethod
    def _has_a_step_evaluator(cls, value: PolicyConfig, info: ValidationInfo) -> PolicyConfig:
        steps = info.data.get("steps")  # absent if that section is invalid, which pydantic reports
        if value.steps != "off" and steps is not None and not steps.enabled:
            raise ValueError(
                f'steps = "{value.steps}" needs the step evaluator, which is not trained; set steps.enabled = true, or '
                'policy.steps = "off"'
            )
        return value

    @field_validator("policy")
    @classmethod
    def _guided_by_the_own_engine(cls, value: PolicyConfig, info: ValidationInfo) -> PolicyConfig:
        backbone = info.data.get("backbone")  # absent if that section is invalid
        if backbone is not None and backbone.engine == "vllm" and not value.spec.changes_policy:
            raise ValueError(
                f'learner = "{value.learner}" guides decoding by value functions, which need the logits of every step; set '
                'backbone.engine = "own", or choose another learner'
            )
        return value

    @field_validator("rounds")
    @classmethod
    def _rounds_move_the_policy(cls, value: int, info: ValidationInfo) -> int:
        # Absent if that section is invalid, which pydantic reports. `rounds` is declared last, so it is validated last.
        policy = info.data.get("policy")
        if value > 1 and policy is not None and not policy.spec.changes_policy:
            raise ValueError(
                f'policy.learner = "{policy.learner}" leaves the policy\'s weights unchanged, so every round would start '
                "from the same policy; choose another learner, or set rounds = 1"
            )
        return value

    def judging(self, role: JudgeRole) -> VerdictsConfig:
        """Return the settings of the verdicts in a role: `judge` and `settings` are those of the judge or of the referee.

        The referee takes no votes, so evaluations do not depend on those of the judge.
        """
        if role == "judge":
            return self.verdicts
        referee = self.evaluation.referee
        name = REFEREE if referee is None else "endpoint"
        return self.verdicts.model_copy(update={"judge": name, "settings": referee, "votes": 1})

    @property
    def servers(self) -> dict[str, EndpointConfig]:
        """The servers of the judge and the referee, by the dotted name of their section."""
        found = {"verdicts.endpoint": self.verdicts.settings, "evaluation.referee": self.evaluation.referee}
        return {name: settings for name, settings in found.items() if isinstance(settings, EndpointConfig)}

    @property
    def all_servers(self) -> dict[str, ServerConfig]:
        """`servers`, and the server of the embedder if the evaluation draws a map, by the dotted name of their section."""
        found: dict[str, ServerConfig] = dict(self.servers)
        settings = self.embeddings.settings
        if self.evaluation.map_points and isinstance(settings, EmbeddingEndpointConfig):
            found["embeddings.endpoint"] = settings
        return found
