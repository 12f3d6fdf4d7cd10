"""Turns a traced float network into an 8-bit one and says how much each layer lost.

Built on torchao's PT2E graphs: `quantize` calibrates and converts, `measure_sqnr` diagnoses, `RANGERS` is the table of
ways to choose a range. Knows a target only by its `IntegerScheme`; never exports, never times, and loads torch and
torchao on first use only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jettison.quantization.diagnose import measure_sqnr as measure_sqnr
    from jettison.quantization.ptq import Quantized as Quantized
    from jettison.quantization.ptq import Site as Site
    from jettison.quantization.ptq import quantize as quantize
    from jettison.quantization.ranges import RANGERS as RANGERS

_WHERE = {"measure_sqnr": "diagnose", "Quantized": "ptq", "Site": "ptq", "quantize": "ptq", "RANGERS": "ranges"}
__all__ = ["RANGERS", "Quantized", "Site", "measure_sqnr", "quantize"]


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
