"""Prompts, the judge in both orders, its confidence, and when it abstains."""
