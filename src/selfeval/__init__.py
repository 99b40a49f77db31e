"""Self-Evaluator: from a handful of seed questions and an open language model to an evaluator and a better policy."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
