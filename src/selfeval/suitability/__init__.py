"""Whether a model can judge a domain: a small sample of the first stages, with every judge, and a recommendation."""
