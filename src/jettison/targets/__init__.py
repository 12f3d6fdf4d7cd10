"""The places a network runs: one file per runtime, and the one measuring protocol.

Each target exports, loads, runs, profiles, audits its own kernels, states its integer arithmetic as plain data and says
what is missing on this machine; `timing` compares callables. Knows flat graphs and files; knows no calibration, no
pruning and no plan. Modules import without their runtime installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from jettison.core.errors import TargetMissing, UnknownName

TARGETS = ("onnxruntime",)
"""The targets a network can be compressed for; each is the module of that name here."""


def find_target(name: str) -> ModuleType:
    """Return a target's module; raises UnknownName with the nearest names, TargetMissing where it is not installed."""
    if name not in TARGETS:
        raise UnknownName("target", name, TARGETS)
    target = importlib.import_module(f"jettison.targets.{name}")
    missing = target.why_missing()
    if missing is not None:
        raise TargetMissing(missing)
    return target
