"""Prompts, and the judges: what they compare, how their verdicts are read, and when they abstain."""
