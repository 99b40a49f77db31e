"""Seeds from documents: read files, cut them into passages, and let a model write questions about them, which are filtered."""
