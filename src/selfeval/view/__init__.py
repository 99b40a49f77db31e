"""`selfeval view`: pages over run folders, rendered by the server; a small script refreshes them. Imports no torch."""
