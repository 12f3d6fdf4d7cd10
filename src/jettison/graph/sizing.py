"""Sizes of a graph that was read from a file: torch's tracer notes them at every node, a file only at the inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.trace import evaluate_node, find_attribute, hint


@dataclass(frozen=True)
class Size:
    """One input: its name, the sizes it was traced with, its type, and whether its first dimension is free."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    free: bool


def read_sizes(module: fx.GraphModule) -> tuple[Size, ...] | None:
    """Return the sizes of a traced graph's inputs; None where the tracer's notes are missing."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") for node in places]
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return tuple(
        Size(
            str(node.target),
            tuple(map(hint, value.shape)),
            str(value.dtype).removeprefix("torch."),
            bool(value.dim()) and not isinstance(value.shape[0], int),
        )
        for node, value in zip(places, values, strict=True)
    )


def make_sizes(module: fx.GraphModule, inputs: Sequence[Size]) -> None:
    """Note at every node what it gives, as the tracer would, in place; tensors hold no numbers.

    What follows from values alone (how many boxes are left) has no size without them: such a node, and those that
    read it, get no note. Raises ValueError where the inputs are not the graph's.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    places = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    if [size.name for size in inputs] != places or not all(_is_sound(size) for size in inputs):
        raise ValueError(f"its inputs are {', '.join(places)}, and those that were saved do not fit")
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = []
    for size in inputs:
        kinds = [DimDynamic.STATIC] * len(size.shape)
        if size.free:
            kinds[0] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        plain = torch.empty(size.shape, dtype=getattr(torch, size.dtype))
        fakes.append(mode.from_tensor(plain, symbolic_context=context))
    feed = iter(fakes)
    values: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                held = find_attribute(module, str(node.target))
                values[node] = mode.from_tensor(held, static_shapes=True) if isinstance(held, Tensor) else held
            elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
                with contextlib.suppress(RuntimeError):  # what torch raises where a size follows from values
                    values[node] = evaluate_node(node, values)
    for node, value in values.items():
        node.meta["val"] = value


def _is_sound(size: Size) -> bool:
    """Tell whether a size read from a file is one: a type of torch's, no negative number, two or more where free."""
    if size.free and (not size.shape or size.shape[0] < 2):
        return False  # torch takes a dimension of one for fixed
    return all(n >= 0 for n in size.shape) and isinstance(getattr(torch, size.dtype, None), torch.dtype)
