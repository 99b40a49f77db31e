"""The section `[steps]`: process supervision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfeval.config.fields import Count, Positive, Share
from selfeval.config.judges import AgreementConfig

__all__ = ["StepCombination", "StepForm", "StepsConfig"]

StepForm = Literal["lines", "sentences"]
"""Unit into which a reply is split."""
StepCombination = Literal["min", "product", "last"]
"""How the probabilities of the steps become a score of the reply."""


class StepsConfig(AgreementConfig):
    """Process supervision: label the steps of replies by completing them, and train an evaluator of steps on the labels."""

    enabled: bool = False
    """Run the stage `steps` (docs/algorithms/steps.md)."""
    form: StepForm = "sentences"
    """Unit of a step: `lines`, or `sentences`."""
    labels: Literal["soft", "hard"] = "soft"
    """Label of a step: `soft`, the share of its completions with the majority's answer; `hard`, 1 if any has it, else 0."""
    completions: Annotated[int, Field(ge=1, le=1024, strict=True)] = 4
    """Completions that are sampled from the end of each step."""
    questions: Count = 200
    """Training questions whose replies are labelled."""
    votes: Annotated[int, Field(ge=2, le=1024, strict=True)] = 16
    """Replies that are sampled per question; the answer of most of them is the reference of the labels."""
    temperature: Positive = 0.7
    """Sampling temperature of votes and completions. Their token limit is that of replies."""
    combine: StepCombination = "min"
    """Score of a reply: the lowest probability of its steps, their product, or the last one, as a log-prob."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    epochs: Count = 2
    """Passes over the labelled replies."""
    batch: Count = 32
    """Batch size: replies per step of training."""
    warmup: Share = 0.05
    """Warmup: share of the steps of training with a rising learning rate."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which gradients are scaled down."""
    checkpoint_every: Count = 50
    """Steps of training between checkpoints."""
    shard: Count = 64
    """Questions per shard."""
