"""The embedded default model: a small language model, its domain of word problems, and a gold oracle for evaluation only."""
