"""Measure on this machine how fast sampling, training, judging and scoring are, against Hugging Face and a physical limit."""
