"""The stages of the loop. Each reads and writes files of the run folder, and nothing else connects them."""
