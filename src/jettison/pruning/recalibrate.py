"""Least-squares recovery: refit every layer of a pruned network to the original's own outputs, no labels needed.

The two graphs run side by side, node by node, over the calibration inputs. At each layer the inputs X are the
pruned network's (errors so far included) and the targets Y the original's outputs at the kept channels;
the weights become the ridge solution that leans towards the weights the pruning left. ThiNet (Luo et al.
2017) and channel pruning (He et al. 2017) solve the same problem; running it in sequence corrects errors
that earlier layers have made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.axes import Keeps, evaluate_mask, is_touched
from jettison.graph.groups import Graph
from jettison.graph.layers import Layer, find_layers, following_batch_norm
from jettison.graph.rewrite import kept_of
from jettison.graph.trace import Batch, evaluate_node, find_attribute, get_tensor, set_tensor
from jettison.progress import track
from jettison.pruning.moments import Moments, make_moments, sample_positions

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate strengths of the pull towards the old weights, as shares of the mean input variance."""
HELD_OUT = 4
"""Every fourth batch judges the candidates and is not fitted to."""


def recalibrate(
    graph: Graph, pruned: fx.GraphModule, keeps: Keeps, batches: Sequence[Batch], *, positions: int, seed: int
) -> dict[str, float]:
    """Refit the layers of `pruned` in place, in the order they run; returns the share of error left per layer.

    `pruned` is what `slice_graph(graph, keeps)` returned, with tensors of its own. A layer keeps its weights
    where no candidate lowers the error on the held-out batches. Layers too wide for a Gram matrix stay as
    they are.
    """
    twins = {n.name: n for n in pruned.graph.nodes}
    layers = {layer.node.name: layer for layer in find_layers(pruned)}
    uses = _count_uses(pruned)
    generator = torch.Generator().manual_seed(seed)
    original: list[dict[fx.Node, Any]] = [{} for _ in batches]
    compressed: list[dict[fx.Node, Any]] = [{} for _ in batches]
    left: dict[str, float] = {}
    nodes = list(graph.module.graph.nodes)
    last_use = _last_uses(nodes)
    extra = _nodes_before(pruned, {n.name for n in nodes})
    with torch.no_grad():
        for node in track(nodes, "Recalibrating"):
            twin = twins[node.name]
            if node.op == "get_attr":
                continue  # read when used: a refit replaces tensors
            for values, batch in zip(original, batches, strict=True):
                values[node] = _value(graph.module, node, values, batch)
            layer = layers.get(node.name)
            if layer is not None and uses[layer.weight] == 1:
                targets = [_kept_target(graph, node, layer, v[node], keeps) for v in original]
                moments = _gather(layer, compressed, pruned, targets, positions, generator)
                if moments is not None:
                    left[layer.name] = _refit(pruned, layer, *moments)
            for values, batch in zip(compressed, batches, strict=True):
                for helper in extra.get(twin, ()):
                    values[helper] = _value(pruned, helper, values, batch)
                values[twin] = _value(pruned, twin, values, batch)
            _forget(node, twins, last_use, original, compressed)
    return left


@torch.no_grad()
def refit_consumers(
    graph: Graph, pruned: fx.GraphModule, keeps: Keeps, moments: Mapping[fx.Node, Moments], *, ridge: float = 1e-3
) -> None:
    """Refit in place the layers that lost inputs, from the original's `moments` alone: no pass over data.

    Exact for a single pruned group; with several, later layers do not see the errors of earlier ones, which
    is what `recalibrate` is for. Grouped layers keep their weights: each of their channels is read alone.
    """
    originals = {layer.node.name: layer for layer in find_layers(graph.module)}
    for layer in find_layers(pruned):
        source = originals[layer.node.name]
        rows, columns = graph.axes.tensors[source.weight][:2]
        found = moments.get(source.node)
        if found is None or layer.groups != 1 or not is_touched(columns, keeps):
            continue
        weight = get_tensor(pruned, layer.weight)
        kernel = weight[0, 0].numel()
        kept = evaluate_mask(columns, keeps).repeat_interleave(kernel).nonzero().flatten().to(weight.device)
        outs = evaluate_mask(rows, keeps).nonzero().flatten().to(weight.device)
        part = Moments(
            found.count, found.xx[:, kept][:, :, kept], found.yx[:, outs][:, :, kept],
            found.x[:, kept], found.y[:, outs], found.yy[:, outs],
        )  # fmt: skip
        home = _find_home(layer)
        matrix = weight.double().reshape(1, weight.shape[0], -1)
        solved, shift, _ = solve_ridge(part, part, matrix, centred=home is not None, ridges=(ridge,))
        _store(pruned, layer, solved, shift, home)


def solve_ridge(
    fit: Moments, judge: Moments, weight: Tensor, *, centred: bool, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, Tensor, float]:
    """Return weight (groups, out, in), bias shift (groups, out) and the share of output variance left unexplained.

    Solves min ‖Y − W X − b‖² + λ‖W − weight‖² for each candidate λ on `fit` and keeps what has the least
    error on `judge`; the weight as given competes too. Without `centred` there is no b.
    """
    xx, yx, _ = fit.centre() if centred else _raw(fit)
    eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
    scale = xx.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
    candidates = [weight]
    for ridge in ridges:
        factor, info = torch.linalg.cholesky_ex(xx + ridge * scale * eye)
        if bool((info == 0).all()):
            right = yx + ridge * scale * weight
            candidates.append(torch.cholesky_solve(right.transpose(1, 2), factor).transpose(1, 2))
    errors = [_unexplained(judge, fit, c, centred) for c in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best], _shift(fit, candidates[best], centred), errors[best]


def _raw(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    n = max(moments.count, 1)
    return moments.xx / n, moments.yx / n, moments.yy / n


def _shift(fit: Moments, weight: Tensor, centred: bool) -> Tensor:
    if not centred:
        return torch.zeros_like(fit.y)
    n = max(fit.count, 1)
    return fit.y / n - (weight @ (fit.x / n)[:, :, None])[:, :, 0]


def _unexplained(judge: Moments, fit: Moments, weight: Tensor, centred: bool) -> float:
    """Mean squared error of a candidate on the held-out positions over the variance of the targets."""
    n = max(judge.count, 1)
    shift = _shift(fit, weight, centred)
    predicted = (weight @ (judge.x / n)[:, :, None])[:, :, 0]
    error = judge.yy / n - 2 * (weight * (judge.yx / n)).sum(2) + ((weight @ (judge.xx / n)) * weight).sum(2)
    error = error + shift * shift + 2 * shift * (predicted - judge.y / n)
    variance = judge.yy / n - (judge.y / n) ** 2
    return float(error.sum() / variance.sum().clamp(min=1e-30))


def _refit(pruned: fx.GraphModule, layer: Layer, fit: Moments, judge: Moments) -> float:
    weight = get_tensor(pruned, layer.weight)
    home = _find_home(layer)
    matrix = weight.double().reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    solved, shift, error = solve_ridge(fit, judge, matrix, centred=home is not None)
    _store(pruned, layer, solved, shift, home)
    return error


def _find_home(layer: Layer) -> str | None:
    """Name the tensor that can take a shift of the layer's output: its bias, or the mean its BatchNorm subtracts."""
    home = layer.node.args[2] if layer.bias else None
    norm = following_batch_norm(layer.node)
    if home is None and norm is not None:
        home = norm.args[3]
    # A tensor that others read too must not be shifted for this layer's sake.
    return str(home.target) if isinstance(home, fx.Node) and len(home.users) == 1 else None


def _store(pruned: fx.GraphModule, layer: Layer, solved: Tensor, shift: Tensor, home: str | None) -> None:
    weight = get_tensor(pruned, layer.weight)
    set_tensor(pruned, layer.weight, solved.reshape(weight.shape).to(weight.dtype))
    if home is not None:
        old = get_tensor(pruned, home)
        new = shift.flatten().to(old.dtype)
        set_tensor(pruned, home, new if layer.bias else old - new)


def _gather(
    layer: Layer,
    compressed: Sequence[Mapping[fx.Node, Any]],
    pruned: fx.GraphModule,
    targets: Sequence[Tensor],
    positions: int,
    generator: torch.Generator,
) -> tuple[Moments, Moments] | None:
    fit = judge = None
    source = layer.node.args[0]
    assert isinstance(source, fx.Node)
    for index, (values, target) in enumerate(zip(compressed, targets, strict=True)):
        pair = sample_positions(layer, values[source], target, positions // len(targets) + 1, generator)
        if pair is None:
            return None
        if fit is None or judge is None:
            sizes = (pair[0].shape[1], pair[0].shape[2], pair[1].shape[2], pair[0].device)
            fit, judge = make_moments(*sizes), make_moments(*sizes)
        (judge if index % HELD_OUT == HELD_OUT - 1 and len(targets) > 1 else fit).add(*pair)
    if fit is None or judge is None:
        return None
    return (fit, judge if judge.count else fit)


def _kept_target(graph: Graph, node: fx.Node, layer: Layer, value: Tensor, keeps: Keeps) -> Tensor:
    dim = 1 if layer.operator == "conv" else value.dim() - 1
    return value.index_select(dim, kept_of(graph, node, dim, keeps).to(value.device))


def _value(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any], batch: Batch) -> Any:
    if node.op == "placeholder":
        return batch[[n for n in module.graph.nodes if n.op == "placeholder"].index(node)]
    tensors = {n: find_attribute(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"}
    return evaluate_node(node, {**values, **tensors})


def _count_uses(module: fx.GraphModule) -> dict[str, int]:
    """Count the readers of each tensor, those that know it by another name too."""
    found = {n: id(find_attribute(module, str(n.target))) for n in module.graph.nodes if n.op == "get_attr"}
    uses: dict[int, int] = {}
    for node, tensor in found.items():
        uses[tensor] = uses.get(tensor, 0) + len(node.users)
    return {str(node.target): uses[tensor] for node, tensor in found.items()}


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for argument in node.all_input_nodes:
            last[argument] = node
    done: dict[fx.Node, list[fx.Node]] = {}
    for argument, node in last.items():
        done.setdefault(node, []).append(argument)
    return done


def _nodes_before(pruned: fx.GraphModule, known: set[str]) -> dict[fx.Node, list[fx.Node]]:
    """Nodes that rewriting has put in (sizes that scale with the batch), listed with the node they precede."""
    waiting: list[fx.Node] = []
    extra: dict[fx.Node, list[fx.Node]] = {}
    for node in pruned.graph.nodes:
        if node.name in known:
            if waiting:
                extra[node], waiting = waiting, []
        else:
            waiting.append(node)
    return extra


def _forget(
    node: fx.Node,
    twins: Mapping[str, fx.Node],
    last_use: Mapping[fx.Node, list[fx.Node]],
    original: Sequence[dict[fx.Node, Any]],
    compressed: Sequence[dict[fx.Node, Any]],
) -> None:
    for done in last_use.get(node, ()):
        for mine, theirs in zip(original, compressed, strict=True):
            mine.pop(done, None)
            theirs.pop(twins[done.name], None)


__all__ = ["recalibrate", "solve_ridge"]
