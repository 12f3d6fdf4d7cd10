"""What a caller hands to a stage, as the flat tensors of a traced network: checked, and in the graph's order."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import InputError, ShapeError, TraceError
from jettison.flow.calibration import Calibration, make_calibration
from jettison.graph.groups import Graph
from jettison.graph.trace import Batch, Traced, trace_module

Data = Iterable[Any] | Tensor


def check_graph(graph: Graph) -> None:
    """Refuse what `trace` did not make."""
    if not isinstance(graph, Graph):
        raise InputError(f"Expected a Graph, got {type(graph).__name__}. Make one with jettison.trace(model, inputs).")


def read_calibration(graph: Graph, calibration: Data, seed: int) -> Calibration:
    """Return calibration data whose items are like the inputs `graph` was traced with."""
    check_graph(graph)
    traced = graph.traced
    data, _, _ = make_calibration(
        calibration, _Signature(traced), seal=False, seed=seed, device=traced.example[0].device
    )
    data = fit_batch(data, traced)
    check_like(replace(traced, dynamic_batch=True), data.take(1)[0])
    return data


def fit_batch(data: Calibration, traced: Traced) -> Calibration:
    """Cut the data to the batch of a network that takes no other."""
    return data if traced.dynamic_batch else replace(data, fixed=len(traced.example[0]))


class _Signature(nn.Module):
    """Stands in for the network where only the names and number of its inputs matter: a graph's are flat."""

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        arguments, keywords = traced.in_spec.child(0), traced.in_spec.child(1)
        places = [(f"input{i}", arguments.child(i)) for i in range(arguments.num_children)]
        places += [(name, keywords.child(i)) for i, name in enumerate(keywords.context or ())]
        flat = iter(traced.input_names)
        parameters = []
        for name, spec in places:
            leaves = [next(flat) for _ in range(spec.num_leaves)]
            name = leaves[0] if spec.is_leaf() else name
            parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD))

        def forward(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def order_inputs(inputs: Any, names: Sequence[str]) -> Batch:
    """Return the tensors of a call in the order of a graph's or a file's inputs."""
    if isinstance(inputs, Mapping) and set(names) <= set(inputs):
        inputs = [inputs[name] for name in names]
    leaves = pytree.tree_leaves(inputs)
    wrong = next((x for x in leaves if not isinstance(x, Tensor)), None)
    if wrong is not None or len(leaves) != len(names):
        given = f"a {type(wrong).__name__}" if wrong is not None else f"{len(leaves)} tensors"
        raise ShapeError(f"The inputs hold {given}. The network takes {', '.join(names)}. Give one tensor for each.")
    return tuple(leaves)


def check_like(traced: Traced, tensors: Batch) -> None:
    """Refuse tensors that differ from the traced example in more than a free batch."""
    start = 1 if traced.dynamic_batch else 0
    for name, mine, example in zip(traced.input_names, tensors, traced.example, strict=True):
        if mine.dim() != example.dim() or mine.shape[start:] != example.shape[start:] or mine.dtype != example.dtype:
            raise ShapeError(
                f"Input {name!r} has shape {tuple(mine.shape)} ({mine.dtype}), the network was traced with "
                f"{tuple(example.shape)} ({example.dtype}). Give inputs like those, or trace it with such as these."
            )


def trace_small(model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Traced:
    """Trace with the first two samples of a batch, which cost less to run; with all where the network wants so many."""

    def shorten(value: Any) -> Any:
        return value[:2] if isinstance(value, Tensor) and value.dim() else value

    few, named = pytree.tree_map(shorten, (arguments, dict(keywords)))
    with contextlib.suppress(InputError, TraceError):  # the whole batch is tried next, and tells what is wrong with it
        traced = trace_module(model, few, named)
        if traced.dynamic_batch:
            return traced
    return trace_module(model, arguments, keywords)
