"""Differences between model families (logits, adapters, caches), and families that transformers does not include."""
