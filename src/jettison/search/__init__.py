"""Choosing under a budget: an exact solver for additive costs, and a planner for costs that couple units.

Knows numbers, indices and callables. It refuses to know tensors, networks, runtimes and what an option stands for.
"""

from __future__ import annotations

from jettison.search.planner import FrontEntry, WidthPlan, plan_widths
from jettison.search.solver import Solution, solve, solve_front, solve_many

__all__ = ["FrontEntry", "Solution", "WidthPlan", "plan_widths", "solve", "solve_front", "solve_many"]
