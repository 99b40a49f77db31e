"""Embedders: texts as vectors, behind one protocol."""

from selfeval.quality.embeddings.protocol import Embedder, Vectors, unit_rows

__all__ = ["Embedder", "Vectors", "unit_rows"]
