"""What a test of pruning needs, for this project's tests and for yours: oracles, small networks, a strategy.

`oracles` prove a graph, a choice or a file right or say by how much it is wrong; `models` builds one small network
for each way axes hang together; `strategies` draws random ones from `blocks` (it alone needs Hypothesis, so it is not
imported here). Refuses to know budgets, targets and reports.
"""

from __future__ import annotations

from jettison.graph.check import check_masked
from jettison.testing.models import MODELS, build_model, randomise
from jettison.testing.oracles import (
    check_composition,
    check_permutation,
    check_prediction,
    check_quantized_round_trip,
    check_round_trip,
    draw_kept,
)

__all__ = [
    "MODELS",
    "build_model",
    "check_composition",
    "check_masked",
    "check_permutation",
    "check_prediction",
    "check_quantized_round_trip",
    "check_round_trip",
    "draw_kept",
    "randomise",
]
