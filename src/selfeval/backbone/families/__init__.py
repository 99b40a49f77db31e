"""What differs between model families (logits, adapters, caches), and those that transformers does not know by itself."""
