"""Structured pruning: which positions of a group matter (`criteria`) and how the rest makes up for what is gone
(`recalibrate`). Refuses to know budgets, targets and files; its table of criteria is `CRITERIA`.
"""
