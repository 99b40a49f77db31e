"""Judging the data and the numbers: intervals, calibration, near-duplicates, diversity, length control.

Plain Python and numpy, no torch. Nothing is imported here; write `from selfeval.quality.statistics import proportion`.
"""
