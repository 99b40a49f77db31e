"""What differs between model families: how logits are made, which modules get adapters, which cache generation uses."""
