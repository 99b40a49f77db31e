"""Measure a judge on pairs of replies that people have labelled: public benchmarks, or the user's own labels."""
