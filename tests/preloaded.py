"""Prepare the server that test processes are forked from (processes.py), to be imported last."""

from __future__ import annotations

import gc

from selfeval.quality.languages import languages_of

# The language model takes half a second to unpack, in each process that accepts questions.
languages_of(["How many apples are left?"])
# Otherwise every full collection of a process visits, and thereby copies, all objects of the imported libraries.
gc.freeze()
