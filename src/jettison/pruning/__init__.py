"""Structured pruning: which positions of a group matter, and how the rest makes up for what is gone.

`criteria` orders positions, `recalibrate` refits what stays. Refuses to know budgets, targets and files; its
table of criteria is `CRITERIA`.
"""
