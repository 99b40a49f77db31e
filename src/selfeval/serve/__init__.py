"""HTTP server of a run: OpenAI-compatible replies, and scores, comparisons and rankings of its evaluator."""
