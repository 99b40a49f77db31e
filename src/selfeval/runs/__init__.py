"""Read a run without its lock: records, report, evaluator, policy, judge, and the export of its roles.

This package only reads the run folder, even while another process writes to it. The stages write it.
"""
