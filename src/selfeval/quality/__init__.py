"""Statistics and data quality: intervals, calibration, near-duplicates, diversity, length control.

Plain Python and NumPy, no torch. The package exports nothing; use `from selfeval.quality.statistics import proportion`.
"""
