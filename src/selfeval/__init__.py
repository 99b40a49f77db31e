"""Self-Evaluator: from a handful of seed questions and an open language model to an evaluator and a better policy.

The Python API. Importing this package does not import torch: each name below is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfeval.config import RunConfig
    from selfeval.errors import (
        ConfigError,
        DataError,
        EndpointError,
        ExportError,
        InputError,
        LoopError,
        LostWorkError,
        MemoryLimitError,
        MissingPackageError,
        ModelError,
        NotFiniteError,
        ProcessGroupError,
        RoleError,
        RunFolderError,
        SeedsError,
        SelfEvalError,
        StorageError,
        TextError,
        WorkerError,
    )
    from selfeval.judge_benchmark.benchmark import JudgeBenchmark, benchmark_judge
    from selfeval.judge_benchmark.label_check import JudgeCheck, judge_check
    from selfeval.policy_comparison.comparing import compare
    from selfeval.policy_comparison.result import PolicyComparison
    from selfeval.quality.text_metrics.scoring import TextMetrics, text_metrics
    from selfeval.runs.comparison import Comparison
    from selfeval.runs.evaluator import Evaluator, Ranking
    from selfeval.runs.judge import Judge
    from selfeval.runs.policy import Policy
    from selfeval.runs.run import Run
    from selfeval.stages.recipes import load_config
    from selfeval.stages.running import run

__all__ = [
    "Comparison",
    "ConfigError",
    "DataError",
    "EndpointError",
    "Evaluator",
    "ExportError",
    "InputError",
    "Judge",
    "JudgeBenchmark",
    "JudgeCheck",
    "LoopError",
    "LostWorkError",
    "MemoryLimitError",
    "MissingPackageError",
    "ModelError",
    "NotFiniteError",
    "Policy",
    "PolicyComparison",
    "ProcessGroupError",
    "Ranking",
    "RoleError",
    "Run",
    "RunConfig",
    "RunFolderError",
    "SeedsError",
    "SelfEvalError",
    "StorageError",
    "TextError",
    "TextMetrics",
    "WorkerError",
    "__version__",
    "benchmark_judge",
    "compare",
    "judge_check",
    "load_config",
    "run",
    "text_metrics",
]

__version__ = "0.1.0"

_MODULES = {
    "Comparison": "selfeval.runs.comparison",
    "Evaluator": "selfeval.runs.evaluator",
    "Judge": "selfeval.runs.judge",
    "JudgeBenchmark": "selfeval.judge_benchmark.benchmark",
    "JudgeCheck": "selfeval.judge_benchmark.label_check",
    "Policy": "selfeval.runs.policy",
    "PolicyComparison": "selfeval.policy_comparison.result",
    "Ranking": "selfeval.runs.evaluator",
    "Run": "selfeval.runs.run",
    "RunConfig": "selfeval.config",
    "TextMetrics": "selfeval.quality.text_metrics.scoring",
    "benchmark_judge": "selfeval.judge_benchmark.benchmark",
    "compare": "selfeval.policy_comparison.comparing",
    "judge_check": "selfeval.judge_benchmark.label_check",
    "load_config": "selfeval.stages.recipes",
    "run": "selfeval.stages.running",
    "text_metrics": "selfeval.quality.text_metrics.scoring",
}
"""Modules that define the names of the API; names that end with `Error` are in `selfeval.errors`."""


def __getattr__(name: str) -> Any:
    """Import a name of the API on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_MODULES.get(name, "selfeval.errors")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
