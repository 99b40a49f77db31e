"""The judges, one file each; `config/judges.py` has the registry that names them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from selfeval.backbone.roles import Backbone
from selfeval.config import JudgeRole, VerdictsConfig, judge_spec
from selfeval.judging.calibrated import CalibratedJudge, calibration_of
from selfeval.judging.protocol import UNFITTED, Judge, JudgeContext, JudgeFit
from selfeval.judging.templates import Templates

__all__ = ["make_judge"]


def make_judge(
    backbone: Backbone,
    templates: Templates,
    config: VerdictsConfig,
    *,
    batch_size: int,
    role: JudgeRole = "judge",
    seed: int = 0,
    temperature: float = 0.0,
    answers: Path | None = None,
    fit: JudgeFit = UNFITTED,
) -> Judge:
    """Return the judge that the configuration names, or the referee.

    Args:
        backbone: the model.
        templates: the prompts, of all kinds that the judge reads.
        config: settings of the verdicts in this role (`RunConfig.judging`).
        batch_size: maximum number of prompts that are generated from at once.
        role: Optional. `referee` for evaluation. Default: the judge that labels training pairs.
        seed: seed of what the judge samples. Default: 0.
        temperature: sampling temperature of the chain of thought of a judge that is otherwise greedy, to measure whether it
            agrees with itself. A judge that samples anyway has its temperature in its settings. Default: 0, greedy.
        answers: Optional. Folder of the answers of a server. Default: none, so a judge that asks a server is refused.
        fit: Optional. Estimates that were made from the judge's verdicts before. Default: none.

    Raises:
        ValueError: the registry names a module outside of this package.
    """
    spec = judge_spec(role, config.judge)
    module, _, name = spec.implementation.partition(":")
    if not module.isidentifier():  # training must not be able to load anything else by name, least of all a gold oracle
        raise ValueError(f"a judge must be a module of {__name__}, written as module:object; got {spec.implementation}")
    context = JudgeContext(backbone, templates, config.kinds(role), config, batch_size, seed, temperature, role, answers, fit)
    judge: Judge = getattr(import_module(f"{__name__}.{module}"), name)(context)
    calibration = calibration_of(config, fit) if role == "judge" else None
    return judge if calibration is None else CalibratedJudge(judge, calibration)
