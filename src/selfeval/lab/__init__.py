"""The embedded default: a small language model, its domain of word problems, and the gold oracle that only evaluation reads."""
