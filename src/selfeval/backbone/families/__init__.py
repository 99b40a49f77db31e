"""Model families that transformers does not know by itself; each is a few files here and one row in `table.py`."""
