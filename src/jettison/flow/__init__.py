"""The stages put together: sensitivity, planning, applying, recovering, measuring, proving, and `compress`.

Owns no algorithm of its own: each stage calls one room below and hands plain data on.
"""
