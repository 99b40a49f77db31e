"""Read a run without its lock: records, report, evaluator, policy, judge, and the export of its roles.

Everything here only reads the run folder, also while another process works in it. The stages write it.
"""
