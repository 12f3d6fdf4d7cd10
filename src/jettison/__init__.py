"""Throw weight overboard, keep the cargo: measured and verified network compression for PyTorch.

Names are loaded on first use, so that `import jettison` needs neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jettison.core.budget import Budget
    from jettison.core.errors import BudgetError, InputError, JettisonError
    from jettison.core.plan import Plan
    from jettison.core.recipe import Recipe
    from jettison.core.record import Record
    from jettison.flow.auditing import audit
    from jettison.flow.choosing import choose_target
    from jettison.flow.compress import Result, compress
    from jettison.flow.delivering import load
    from jettison.flow.diagnosing import diagnose
    from jettison.flow.evaluation import accuracy
    from jettison.flow.mixing import choose_bits
    from jettison.flow.prune import prune
    from jettison.flow.qat import train_quantized
    from jettison.flow.stages import apply, export, measure, plan, profile, quantize, recover, sensitivity, verify
    from jettison.graph.depth import find_blocks
    from jettison.graph.groups import Graph, trace
    from jettison.quantization.storing import load_quantized

__version__ = "0.1.0"

_HOMES = {
    "Budget": "core.budget",
    "BudgetError": "core.errors",
    "Graph": "graph.groups",
    "InputError": "core.errors",
    "JettisonError": "core.errors",
    "Plan": "core.plan",
    "Recipe": "core.recipe",
    "Record": "core.record",
    "Result": "flow.compress",
    "accuracy": "flow.evaluation",
    "apply": "flow.stages",
    "audit": "flow.auditing",
    "choose_bits": "flow.mixing",
    "choose_target": "flow.choosing",
    "compress": "flow.compress",
    "diagnose": "flow.diagnosing",
    "export": "flow.stages",
    "find_blocks": "graph.depth",
    "load": "flow.delivering",
    "load_quantized": "quantization.storing",
    "measure": "flow.stages",
    "plan": "flow.stages",
    "profile": "flow.stages",
    "prune": "flow.prune",
    "quantize": "flow.stages",
    "recover": "flow.stages",
    "sensitivity": "flow.stages",
    "trace": "graph.groups",
    "train_quantized": "flow.qat",
    "verify": "flow.stages",
}

__all__ = [
    "Budget",
    "BudgetError",
    "Graph",
    "InputError",
    "JettisonError",
    "Plan",
    "Recipe",
    "Record",
    "Result",
    "accuracy",
    "apply",
    "audit",
    "choose_bits",
    "choose_target",
    "compress",
    "diagnose",
    "export",
    "find_blocks",
    "load",
    "load_quantized",
    "measure",
    "plan",
    "profile",
    "prune",
    "quantize",
    "recover",
    "sensitivity",
    "trace",
    "train_quantized",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jettison' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jettison.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
