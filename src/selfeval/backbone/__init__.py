"""One frozen base model and the roles on it: loading, LoRA adapters, heads, memory, and scoring of token sequences."""
