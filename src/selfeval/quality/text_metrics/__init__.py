"""Text metrics: overlap with references, and repetition within a collection. `scoring.text_metrics` is the entry point."""
