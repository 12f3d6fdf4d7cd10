"""Oracles for pruning: the masked interpreter that proves a sliced network against the original graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from jettison.core.record import Check
from jettison.graph.axes import Keeps, evaluate_mask, is_touched
from jettison.graph.groups import Graph
from jettison.graph.reductions import STATISTICS, normalise_batch, restrict
from jettison.graph.subgraphs import choose_region, count_branch_levels, list_regions
from jettison.graph.trace import Batch, evaluate_node, find_attribute

MASKED_TOLERANCE = 1e-10
"""Largest relative difference in float64: rounding of differently ordered sums, nothing else."""
VACUOUS = 1e-6
"""A keep-set that changes the output by less (relative) proves nothing."""

aten = torch.ops.aten


def check_masked(graph: Graph, pruned: fx.GraphModule, keeps: Keeps, inputs: Batch) -> Check:
    """Compare `pruned` with the original graph under masks, in float64, on `inputs`.

    Every node of the original is multiplied by the mask of its own terms; norms over a pruned axis take
    their statistics over kept positions. `pruned` must hold the weights that slicing gave, not retrained ones.
    The value is the largest difference relative to 1 + the largest output. A float64 copy is made; nothing of
    the caller's changes.
    """
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    error = effect = 0.0
    # Inputs take one branch of a torch.cond; every way through the network must hold.
    for ways in itertools.product((0, 1), repeat=count_branch_levels(graph.module)):
        with torch.no_grad():
            masked, original = run_both(graph, keeps, wide, ways)
            kept = _keep_outputs(graph, keeps, masked)
            sliced = run_double(pruned, wide, ways)
        scale = 1 + max(float(y.double().abs().max()) for y in original)
        error = max(error, measure_difference(kept, sliced) / scale)
        effect = max(effect, measure_difference(masked, original) / scale)
    touched = any(not bool(v.all()) for v in keeps.values())
    vacuous = touched and effect < VACUOUS
    detail = f"the kept outputs, float64; pruning changes the output by {effect:.2g}"
    if vacuous:
        detail += ", too little for this to prove anything"
    return Check("masked = sliced", error <= MASKED_TOLERANCE and not vacuous, error, MASKED_TOLERANCE, detail)


def _keep_outputs(graph: Graph, keeps: Keeps, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take the dropped positions out of the outputs whose channels are free."""
    node = next(n for n in reversed(graph.module.graph.nodes) if n.op == "output")
    terms = [graph.axes.terms[a] for a in node.args[0] if isinstance(a, fx.Node) and _is_tensor(a)]
    kept = list(outputs)
    for number, (value, dims) in enumerate(zip(outputs, terms, strict=True)):
        for dim, term in enumerate(dims):
            if is_touched(term, keeps):
                value = value.index_select(dim, evaluate_mask(term, keeps).nonzero().flatten().to(value.device))
        kept[number] = value
    return tuple(kept)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def measure_difference(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    """Return the largest absolute difference between two lists of tensors; infinite where shapes or numbers break."""
    worst = 0.0
    for a, b in zip(some, others, strict=True):
        if a.shape != b.shape:
            return math.inf
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def run_masked(graph: Graph, keeps: Keeps, inputs: Batch, ways: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Run the original graph in float64 with every node's output multiplied by the keep-mask of its terms.

    `ways` says which branch to take at each level of nested branches, 0 the true one; without it, conditions decide.
    """
    return _list_outputs(_run(graph.module, [inputs], [_make_masked_step(graph, keeps)], ways))[0]


def run_double(module: fx.GraphModule, inputs: Batch, ways: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Run a flat graph with its weights read as float64; returns the tensors among its outputs; `ways` as above."""
    return _list_outputs(_run(module, [inputs], [_evaluate_wide], ways))[0]


def run_both(
    graph: Graph, keeps: Keeps, inputs: Batch, ways: Sequence[int] | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return what `run_masked` and `run_double` give for the original graph; each weight is read once for both."""
    steps = [_make_masked_step(graph, keeps), _evaluate_wide]
    masked, whole = _list_outputs(_run(graph.module, [inputs, inputs], steps, ways))
    return masked, whole


Step = Callable[[fx.Node, Mapping[fx.Node, Any]], Any]
"""Computes a node from the values of its arguments; for a weight its own value is among them."""


def _make_masked_step(graph: Graph, keeps: Keeps) -> Step:
    def step(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        # Weights and buffers too: a network may multiply one by another. And a recurrent unit's state cannot be masked
        # from outside between two steps; with its rows and columns of every weight at zero it needs no mask: its gates
        # are then sigmoid(0) and tanh(0) = 0, so a state that starts at zero stays there, exactly, for LSTM
        # (c = f c + i 0), GRU (h = (1 - z) 0 + z h) and plain RNN (h = tanh(0) or relu(0)).
        value = values[node] if node.op == "get_attr" else _evaluate(node, values, graph, keeps)
        return _mask(value, graph.axes.terms.get(node, ()), keeps)

    return step


def _list_outputs(found: list[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(v for v in outputs if isinstance(v, Tensor)) for outputs in found]


def _run(
    module: fx.GraphModule, feeds: Sequence[Sequence[Any]], steps: Sequence[Step], ways: Sequence[int] | None
) -> list[tuple[Any, ...]]:
    """Run a graph in several ways side by side: each has its own inputs, its own step and its own outputs."""
    sides: list[dict[fx.Node, Any]] = [{} for _ in steps]
    last_use = {argument: node for node in module.graph.nodes for argument in node.all_input_nodes}
    waiting = [iter(feed) for feed in feeds]
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            for values, feed in zip(sides, waiting, strict=True) if node.op == "placeholder" else ():
                values[node] = next(feed)
            continue
        _read_weights(module, node, sides, steps)
        if node.op == "output":
            found = [evaluate_node(node, values) for values in sides]
            return [tuple(f) if isinstance(f, (tuple, list)) else (f,) for f in found]
        if regions := list_regions(module, node):
            # Autocast leaves float64 alone, so its regions need no context here.
            is_branch = len(regions) > 1
            region = regions[ways[0]] if is_branch and ways else choose_region(node, regions, sides[0])
            inner = [[values[o] if isinstance(o, fx.Node) else o for o in region.operands] for values in sides]
            outputs = _run(region.module, inner, steps, ways[1:] if is_branch and ways else ways)
            for values, output in zip(sides, outputs, strict=True):
                values[node] = output
        else:
            for values, step in zip(sides, steps, strict=True):
                values[node] = step(node, values)
        for argument in node.all_input_nodes:
            if last_use[argument] is node:
                for values in sides:
                    del values[argument]
    raise AssertionError("a graph without an output node")


def _read_weights(
    module: fx.GraphModule, node: fx.Node, sides: Sequence[dict[fx.Node, Any]], steps: Sequence[Step]
) -> None:
    """Read the weights of a node where it runs: all of them at once in float64 are more than a cache holds."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and argument not in sides[0]:
            weight = _widen(find_attribute(module, str(argument.target)))
            for values, step in zip(sides, steps, strict=True):
                values[argument] = weight
                values[argument] = step(argument, values)


def _widen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().double() if value.is_floating_point() else value.detach()


def _mask(value: Any, dims: Any, keeps: Keeps) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_mask(v, d, keeps) for v, d in zip(value, dims, strict=True))
    if not isinstance(value, Tensor):
        return value
    mask: Tensor | None = None
    for dim, term in enumerate(dims):
        if is_touched(term, keeps):
            shape = [1] * value.dim()
            shape[dim] = -1
            kept = evaluate_mask(term, keeps).to(value.device).reshape(shape)
            mask = kept if mask is None else mask & kept
    # Not a product: where all of a removed position's numbers are zero, a division has made NaN.
    return value if mask is None else torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _evaluate(node: fx.Node, values: Mapping[fx.Node, Any], graph: Graph, keeps: Keeps) -> Any:
    packet = getattr(node.target, "overloadpacket", None)
    restricted = _RESTRICTED.get(packet)
    if restricted is not None:
        return restricted(_bind(node, values), graph.axes.terms[node], keeps)
    if packet in STATISTICS:
        source = node.all_input_nodes[0]
        return _evaluate_wide(node, restrict(source, node, values, graph.axes.terms[source], keeps))
    if packet == aten.batch_norm and _bind(node, values)[5]:
        return normalise_batch(_bind(node, values), graph.axes.terms[node], keeps)
    return _evaluate_wide(node, values)


def _evaluate_wide(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Compute a node in float64, also where the network asks for a narrower type."""

    def widen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return values[value]
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    if node.op == "get_attr":
        return values[node]
    # Masks and another type leave other strides behind than those a view was traced with.
    target = aten.reshape.default if node.target in _VIEWS else node.target
    assert callable(target)
    value = target(*fx.node.map_aggregate(node.args, widen), **fx.node.map_aggregate(node.kwargs, widen))
    # Tensors made inside forward have torch's default type where the network names none.
    return tuple(map(_widen, value)) if isinstance(value, (tuple, list)) else _widen(value)


_VIEWS = (aten.view.default, aten._unsafe_view.default)


def _bind(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
    """Return all arguments by position, those given by name and those left out too."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = list(node.args)
    for argument in node.target._schema.arguments[len(given) :]:
        given.append(node.kwargs.get(argument.name, argument.default_value))
    bound: tuple[Any, ...] = tuple(fx.node.map_arg(given, lambda n: values[n]))
    return bound


def _layer_norm(args: tuple[Any, ...], dims: Any, keeps: Keeps) -> Tensor:
    """Layer norm whose mean and variance are taken over kept positions only."""
    x: Tensor = args[0]
    shape = args[1]
    count = len(shape)
    mask = torch.ones((), dtype=x.dtype, device=x.device)
    for term in dims[-count:]:
        mask = mask[..., None] * evaluate_mask(term, keeps).to(x)
    axes = tuple(range(-count, 0))
    total = mask.sum()
    mean = (x * mask).sum(axes, keepdim=True) / total
    variance = (((x - mean) * mask) ** 2).sum(axes, keepdim=True) / total
    out: Tensor = (x - mean) / torch.sqrt(variance + args[4])
    if args[2] is not None:
        out = out * args[2]
    if args[3] is not None:
        out = out + args[3]
    return out * mask


def _group_norm(args: tuple[Any, ...], dims: Any, keeps: Keeps) -> Tensor:
    """Group norm whose statistics are taken over kept positions of each group."""
    x: Tensor = args[0]
    groups = int(args[1])
    mask = evaluate_mask(dims[1], keeps).to(x).reshape(1, groups, -1, 1)
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    total = (mask.sum(2, keepdim=True) * grouped.shape[3]).clamp(min=1)
    mean = (grouped * mask).sum((2, 3), keepdim=True) / total
    variance = (((grouped - mean) * mask) ** 2).sum((2, 3), keepdim=True) / total
    out = ((grouped - mean) / torch.sqrt(variance + args[4])).reshape(x.shape)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    if args[2] is not None:
        out = out * args[2].reshape(shape)
    if args[3] is not None:
        out = out + args[3].reshape(shape)
    return out


def _rms_norm(args: tuple[Any, ...], dims: Any, keeps: Keeps) -> Tensor:
    """RMS norm whose mean square is taken over kept positions only."""
    x: Tensor = args[0]
    count = len(args[1])
    mask = torch.ones((), dtype=x.dtype, device=x.device)
    for term in dims[-count:]:
        mask = mask[..., None] * evaluate_mask(term, keeps).to(x)
    square = ((x * mask) ** 2).sum(tuple(range(-count, 0)), keepdim=True) / mask.sum()
    eps = args[3] if args[3] is not None else torch.finfo(x.dtype).eps
    out: Tensor = x * torch.rsqrt(square + eps)
    if args[2] is not None:
        out = out * args[2]
    return out


_RESTRICTED: dict[Any, Callable[[tuple[Any, ...], Any, Keeps], Tensor]] = {
    aten.layer_norm: _layer_norm,
    aten.group_norm: _group_norm,
    aten.rms_norm: _rms_norm,
}
