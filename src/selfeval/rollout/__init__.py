"""The generation engine on the backbone's own weights: prefixes computed once, finished rows leaving, log-probs as drawn."""
