"""Prompts, and the judge: both orders, confidence, and abstention."""
