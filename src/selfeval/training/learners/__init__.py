"""The learners, one file each; the registry is in `config/learners.py`."""

from __future__ import annotations

from importlib import import_module

from selfeval.training.context import LearnerContext
from selfeval.training.learners.learner import Learner

__all__ = ["Learner", "make_learner"]


def make_learner(context: LearnerContext) -> Learner:
    """Create the learner selected by the configuration, and add the roles that it needs to the backbone.

    Raises:
        ValueError: the registry names a module outside this package.
    """
    implementation = context.config.spec.implementation
    module, _, name = implementation.partition(":")
    if not module.isidentifier():  # no other module may be loaded by name, least of all a gold oracle
        raise ValueError(f"a learner must be a module of {__name__}, written as module:object; got {implementation}")
    learner: Learner = getattr(import_module(f"{__name__}.{module}"), name)(context)
    return learner
