"""The eager result compared with its graph on small pictures: the same equation, for a fraction of the cost.

It holds only where the caller's forward makes the same calls with the same numbers as on the example inputs, and where
no dimension shrinks to one position. Whatever differs is left to the comparison on the example inputs, which decides.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from jettison.core.errors import FixedSize
from jettison.graph.comparing import Proof, measure_error, run_eager, run_wide, tolerance_of
from jettison.graph.matching import Path
from jettison.graph.subgraphs import iterate_nodes
from jettison.graph.trace import Batch, Traced, shapes_of

SIDE = 64
"""Pixels of a small picture: networks that halve theirs five times keep two of each."""


def shrink(example: Batch) -> Batch | None:
    """Return the inputs with fewer pixels in their pictures (the last two of four or five dimensions), if any do.

    Pixels are taken from all over a picture: a corner may be a black border. None where what is left has one colour.
    """
    small = tuple(_shrink_picture(x) if _is_picture(x) else x for x in example)
    changed = [s for s, x in zip(small, example, strict=True) if s is not x]
    return small if changed and not any(bool((s == s.flatten()[0]).all()) for s in changed) else None


def _shrink_picture(x: Tensor) -> Tensor:
    height, width = (size // SIDE for size in x.shape[-2:])
    return x[..., ::height, ::width][..., :SIDE, :SIDE].contiguous()


def _is_picture(x: Tensor) -> bool:
    return x.dim() in (4, 5) and x.is_floating_point() and min(x.shape[-2:]) > SIDE


def run_small(model: nn.Module, sliced: fx.GraphModule, example: Batch) -> Proof | None:
    """Run the sliced graph on small pictures, in float64; None where there are none or they would not tell as much."""
    inputs = shrink(example)
    if inputs is None:
        return None
    try:
        proof, shapes = run_wide(model, sliced, inputs)
    except Exception:  # noqa: BLE001 - a graph made for one size may stop in any way
        return None
    nodes = {node.name: node for node in iterate_nodes(sliced)}
    vanishes = any(_vanishes(shapes_of(nodes[name]), found) for name, found in shapes.items())
    return None if vanishes else proof


def _vanishes(whole: Any, small: Any) -> bool:
    """Tell whether a dimension has one position left: a norm or softmax over it would hide all that went before."""
    if whole is None or len(whole) != len(small):
        return True
    if isinstance(small, list):
        return any(map(_vanishes, whole, small))
    return any(a > 1 >= b for a, b in zip(whole, small, strict=True))


def is_equal(result: nn.Module, traced: Traced, proof: Proof, path: Path) -> bool:
    """Tell whether the eager result gives what `proof` says, by the same calls as on the example inputs (`path`)."""
    taken = Path()
    try:
        found = run_eager(result, traced, proof, taken)
    except FixedSize:
        return False
    is_alike = [v.shape for v in found] == [v.shape for v in proof.outputs] and taken.calls == path.calls
    return is_alike and measure_error(found, proof.outputs) <= tolerance_of(proof)


__all__ = ["is_equal", "run_small", "shrink"]
