"""What a network costs: MACs, parameters and activation memory by formula, layer latency by measurement in the runtime.

Reads traced graphs (`count`) and plain layer shapes (`measure_table`, `latency_ms`). It refuses to know what is done
with a cost: nothing here prunes, quantises, searches or draws, and no time is ever computed from MACs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jettison.cost.latency import LatencyTable, latency_ms, measure_table
    from jettison.cost.layers import LayerShape
    from jettison.cost.macs import Profile, count
    from jettison.cost.timing import measure_layers

_HOMES = {
    "LatencyTable": "latency",
    "latency_ms": "latency",
    "measure_table": "latency",
    "LayerShape": "layers",
    "Profile": "macs",
    "count": "macs",
    "measure_layers": "timing",
}
__all__ = ["LatencyTable", "LayerShape", "Profile", "count", "latency_ms", "measure_layers", "measure_table"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that latency tables need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
