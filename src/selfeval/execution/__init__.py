"""Unit tests of the code in replies, run in a sandbox. Only gold runs them, so no stage before evaluation does."""
