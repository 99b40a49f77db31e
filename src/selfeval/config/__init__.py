"""The configuration of a run: one frozen model per section, every field with its unit and range.

A recipe is a TOML file with these names; `--set policy.iterations=20` overrides one. An unknown name raises an error that
suggests the nearest one. This package does not import torch.
"""

from __future__ import annotations

from selfeval.config.backbone import BackboneConfig, ContextConfig, LoraConfig, PlacementConfig, VLLMConfig
from selfeval.config.chat import ChatConfig
from selfeval.config.embeddings import (
    EMBEDDERS,
    BackboneEmbedderConfig,
    EmbedderConfig,
    EmbedderSpec,
    EmbeddingEndpointConfig,
    EmbeddingsConfig,
    SentenceTransformersConfig,
    StaticEmbedderConfig,
)
from selfeval.config.judges import (
    JUDGES,
    REFEREE,
    REPLY,
    RUBRIC,
    AgreementConfig,
    CalibrationConfig,
    CombinedConfig,
    EndpointConfig,
    JudgeConfig,
    JudgeRole,
    JudgeSpec,
    PointwiseConfig,
    TemplateKind,
    judge_spec,
)
from selfeval.config.learners import (
    LEARNERS,
    ClippedConfig,
    CriticConfig,
    DPOConfig,
    EntropyFloorConfig,
    GRPOConfig,
    ILQLConfig,
    LearnerConfig,
    LearnerSpec,
    PolicyGradientConfig,
    PPOConfig,
    RAFTConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
    SoftQConfig,
    TRPOConfig,
    ValueLearnerConfig,
)
from selfeval.config.load import config_of_run, load_config
from selfeval.config.policy import PolicyConfig
from selfeval.config.run import RunConfig
from selfeval.config.scale import ScaleConfig
from selfeval.config.sections import (
    EvaluationConfig,
    EvaluatorConfig,
    MemberInput,
    PairsConfig,
    Pooling,
    QuestionsConfig,
    RepliesConfig,
    TuningConfig,
    VerdictsConfig,
)
from selfeval.config.servers import ServerConfig
from selfeval.config.steps import StepCombination, StepForm, StepsConfig
from selfeval.texts import nearest

__all__ = [
    "EMBEDDERS",
    "JUDGES",
    "LEARNERS",
    "REFEREE",
    "REPLY",
    "RUBRIC",
    "AgreementConfig",
    "BackboneConfig",
    "BackboneEmbedderConfig",
    "CalibrationConfig",
    "ChatConfig",
    "ClippedConfig",
    "CombinedConfig",
    "ContextConfig",
    "CriticConfig",
    "DPOConfig",
    "EmbedderConfig",
    "EmbedderSpec",
    "EmbeddingEndpointConfig",
    "EmbeddingsConfig",
    "EndpointConfig",
    "EntropyFloorConfig",
    "EvaluationConfig",
    "EvaluatorConfig",
    "GRPOConfig",
    "ILQLConfig",
    "JudgeConfig",
    "JudgeRole",
    "JudgeSpec",
    "LearnerConfig",
    "LearnerSpec",
    "LoraConfig",
    "MemberInput",
    "PPOConfig",
    "PairsConfig",
    "PlacementConfig",
    "PointwiseConfig",
    "PolicyConfig",
    "PolicyGradientConfig",
    "Pooling",
    "QuestionsConfig",
    "RAFTConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforcePPConfig",
    "RepliesConfig",
    "RunConfig",
    "ScaleConfig",
    "SentenceTransformersConfig",
    "ServerConfig",
    "SoftQConfig",
    "StaticEmbedderConfig",
    "StepCombination",
    "StepForm",
    "StepsConfig",
    "TRPOConfig",
    "TemplateKind",
    "TuningConfig",
    "VLLMConfig",
    "ValueLearnerConfig",
    "VerdictsConfig",
    "config_of_run",
    "judge_spec",
    "load_config",
    "nearest",
]
