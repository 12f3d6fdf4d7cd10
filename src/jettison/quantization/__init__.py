"""Turns a traced float network into an integer one and says how much each layer lost.

Built on torchao's PT2E graphs: `quantize` calibrates and converts, `RUNGS` is the table of what makes the result better
and `climb` takes them one by one, `RANGERS` is the table of ways to choose a range, `measure_sqnr` diagnoses. Knows a
target only by its `IntegerScheme`; never exports, never times, and loads torch and torchao on first use only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jettison.quantization.convert import Quantized as Quantized
    from jettison.quantization.convert import Site as Site
    from jettison.quantization.diagnose import measure_sqnr as measure_sqnr
    from jettison.quantization.ladder import RUNGS as RUNGS
    from jettison.quantization.ladder import Climb as Climb
    from jettison.quantization.ladder import climb as climb
    from jettison.quantization.ptq import quantize as quantize
    from jettison.quantization.ranges import RANGERS as RANGERS

_WHERE = {
    "measure_sqnr": "diagnose",
    "Climb": "ladder",
    "climb": "ladder",
    "RUNGS": "ladder",
    "Quantized": "convert",
    "Site": "convert",
    "quantize": "ptq",
    "RANGERS": "ranges",
}
__all__ = ["RANGERS", "RUNGS", "Climb", "Quantized", "Site", "climb", "measure_sqnr", "quantize"]


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
