"""Plain data: errors, budget, plan, recipe and record.

Standard library only; knows no tensor and no file format but JSON.
"""
