"""The places a network runs: one file per runtime, and the one measuring protocol.

Each target exports, loads, runs, profiles, audits its own kernels, states its integer arithmetic as plain data and says
what is missing on this machine; `timing` compares callables. Knows flat graphs and files; knows no calibration, no
pruning and no plan. Modules import without their runtime installed.

A target's constants: `LABEL` for people; `SUFFIX` of its files; `PRECISIONS` it computes in; `PACKAGE`, whose version
decides what a file gives; `EXACT`, whether its integer kernels give every bit of `quantization.integers`' reference;
`PROFILED`, whether it times single operators.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from jettison.core.errors import InputError, TargetMissing, UnknownName

TARGETS = ("onnxruntime", "openvino", "executorch", "litert", "eager", "inductor")
"""Where a network can run; each is the module of that name here."""


def find_target(name: str) -> ModuleType:
    """Return a target's module; raises UnknownName with the nearest names, TargetMissing where it is not installed."""
    if name == "auto":
        raise InputError(
            'target="auto" measures every target, which needs typical inputs. `compress` takes it; else call '
            "jettison.choose_target(model, calibration) and pass its .recommended.target."
        )
    if name not in TARGETS:
        raise UnknownName("target", name, TARGETS)
    target = importlib.import_module(f"jettison.targets.{name}")
    missing = target.why_missing()
    if missing is not None:
        raise TargetMissing(missing)
    return target
