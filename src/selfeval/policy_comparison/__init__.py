"""Compare the policies of several runs, and replies from files, on the same questions."""
