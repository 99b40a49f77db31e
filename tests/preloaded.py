"""Prepare the server that test processes are forked from (processes.py), to be imported last."""

from __future__ import annotations

import gc

import selfeval.cli.closing
import selfeval.judging.judges.pairwise
import selfeval.stages.rounds
import selfeval.training.learners.ppo  # noqa: F401
from selfeval.config import load_config
from selfeval.quality.languages import languages_of
from selfeval.stages.preflight import check_base
from toy import LAB

# The language model takes half a second to unpack, in each process that accepts questions.
languages_of(["How many apples are left?"])
# The first model takes longer than others: transformers imports its class and compiles a thousand patterns of names of weights.
check_base(load_config(LAB / "recipe.toml", {}))
# Otherwise every full collection of a process visits, and thereby copies, all objects of the imported libraries.
gc.collect()
gc.freeze()
