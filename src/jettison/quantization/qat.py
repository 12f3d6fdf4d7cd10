"""From a converted graph to one that trains, and back to exactly the same form.

Every quantizer becomes a learned one (see `lsq`), starting from what post-training quantization chose, so that the
first forward gives what the converted graph gives. Tensors that share a scale share one parameter. BatchNorm stays
folded with its frozen statistics: simple and stable, at the price of the regularisation that batch statistics give and
of a scale per channel that learns at its own rate. Where a range stood for an activation (ReLU6), its upper end is
learned freely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from jettison.quantization.convert import fold, is_integer
from jettison.quantization.fold import add_biases, copy_graph, find_layers, name_operator, read_attribute, set_buffer
from jettison.quantization.lsq import (
    COARSE,
    find_coarse_step,
    find_integers,
    find_offset,
    find_step,
    find_zero_point,
    round_activation,
    round_bias,
    round_coarse,
    round_weight,
)
from jettison.quantization.weights import Weight, read_weight, write_weight
from jettison.targets.integer import IntegerScheme, Levels

GROWTH, FIRST, PLACE = "growth", "first_step", "place"
EDGE = 0.49
"""A float weight whose integer was chosen otherwise than by rounding is brought this near to it, in steps."""


@dataclass(frozen=True)
class Spot:
    """An integer layer: its names in the graph, its output-channel axis, levels, and how its weight is rounded."""

    weight: str
    bias: str | None
    axis: int
    levels: Levels
    form: str


def make_trainable(
    converted: GraphModule, original: GraphModule, scheme: IntegerScheme, *, coarse: dict[str, str] | None = None
) -> GraphModule:
    """Return the converted graph with learned quantizers; both graphs are left alone.

    `original` is the float graph it was made from: its weights are what is trained. `coarse` names layers whose weights
    become "ternary" or "binary". The parameters are weights, biases, and for each quantizer `growth` (and `place`).
    """
    student = copy_graph(converted)
    folded = fold(original, frozenset(scheme.weighted))
    add_biases(folded, frozenset(scheme.weighted))
    learned = {name for name, _ in original.named_parameters()}
    for node in list(student.graph.nodes):
        name = str(node.target)
        if node.op == "get_attr" and name in learned and read_attribute(student, name).is_floating_point():
            _set_parameter(student, name, read_attribute(student, name))
    spots = dict(list_spots(converted, scheme, coarse or {}))
    calls = find_layers(student, frozenset(scheme.weighted))
    # Weights first: they are read with the quantization of the layer's input still in place.
    inputs = {name: _prepare_weight(student, folded, calls[name], spot) for name, spot in spots.items()}
    steps = _replace_activations(student, scheme)
    for name, spot in spots.items():
        _replace_weight(student, calls[name], spot, steps[inputs[name]])
    student.graph.eliminate_dead_code()
    student.graph.lint()
    result = GraphModule(student, student.graph)
    result.train(False)
    return result


def convert_trained(
    student: GraphModule, converted: GraphModule, scheme: IntegerScheme, *, coarse: dict[str, str] | None = None
) -> GraphModule:
    """Return a copy of `converted` with the integers, scales and zero points that the trained `student` stands for."""
    result = copy_graph(converted)
    with torch.no_grad():
        for index, group in enumerate(group_roundings(result, scheme)):
            step, zero = read_activation(student, index, group[0])
            for node in group:
                for call in (node, *_list_restoring(node)):
                    call.args = (call.args[0], step, zero, *call.args[3:])
        calls = find_layers(result, frozenset(scheme.weighted))
        for name, spot in list_spots(converted, scheme, coarse or {}):
            old = read_weight(result, calls[name])
            integers, scale = read_integers(student, spot)
            bias = None if spot.bias is None else read_attribute(student, spot.bias).detach().clone()
            write_weight(result, calls[name], Weight(integers, scale, bias, old.input_scale))
        for name, value in student.named_parameters():
            stored = _find(result, name)
            if stored is not None and stored.is_floating_point():
                set_buffer(result, name, value.detach().clone())
    result.recompile()
    return result


def list_spots(converted: GraphModule, scheme: IntegerScheme, coarse: dict[str, str]) -> Iterator[tuple[str, Spot]]:
    """Give the integer layers of a converted graph by name."""
    for name, node in find_layers(converted, frozenset(scheme.weighted)).items():
        if not is_integer(node):
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight, Node) and isinstance(weight.args[0], Node)
        axis, low, high = weight.args[3:6]
        assert isinstance(axis, int) and isinstance(low, int) and isinstance(high, int)
        stored = bias.args[0] if isinstance(bias, Node) and bias.op == "call_function" else None
        bias_name = str(stored.target) if isinstance(stored, Node) else None
        yield name, Spot(str(weight.args[0].target), bias_name, axis, Levels(low, high, True), coarse.get(name, "step"))


def read_integers(student: GraphModule, spot: Spot) -> tuple[Tensor, Tensor]:
    """Return a layer's integers (as float32) and scales as the student has them now."""
    weight = read_attribute(student, spot.weight)
    if spot.form in COARSE:
        return COARSE[spot.form](weight, spot.axis)
    step = read_step(student, spot)
    return find_integers(weight, step, spot.axis, spot.levels.q_min, spot.levels.q_max), step


def read_step(student: GraphModule, spot: Spot) -> Tensor:
    """Return a layer's weight steps, one per channel."""
    stem = spot.weight
    return find_step(read_attribute(student, f"{stem}_{FIRST}"), read_attribute(student, f"{stem}_{GROWTH}")).detach()


def read_activation(student: GraphModule, index: int, rounding: Node) -> tuple[float, int]:
    """Return the step and zero point that the student has for a group, of which `rounding` is one, of quantizers."""
    levels, zero = _levels_of(rounding), rounding.args[2]
    assert isinstance(zero, int)
    stem = _name_group(index)
    first = read_attribute(student, f"{stem}_{FIRST}")
    step = find_step(first, read_attribute(student, f"{stem}_{GROWTH}")).detach()
    place = _find(student, f"{stem}_{PLACE}")
    if place is None:
        return float(step), zero  # it does not move
    offset = find_offset(first, place.detach(), levels.q_min, levels.q_max)
    return float(step), int(find_zero_point(offset, step, levels.q_min, levels.q_max))


def list_undecayed(student: GraphModule) -> frozenset[str]:
    """Return the parameters that weight decay must leave alone: steps, offsets and biases."""
    names = [name for name, _ in student.named_parameters()]
    return frozenset(n for n in names if n.endswith((f"_{GROWTH}", f"_{PLACE}", "bias")))


def group_roundings(converted: GraphModule, scheme: IntegerScheme) -> list[list[Node]]:
    """Return the activation quantizers of a converted graph in its order, those with one scale together."""
    nodes = [n for n in converted.graph.nodes if is_rounding(n)]
    leader: dict[Node, Node] = {node: node for node in nodes}

    def find(node: Node) -> Node:
        found: Node = node
        while leader[found] is not found:
            found = leader[found]
        return found

    def join(members: list[Node]) -> None:
        for other in members[1:]:
            if other.args[1:5] == members[0].args[1:5]:
                leader[find(other)] = find(members[0])

    for node in converted.graph.nodes:
        join([user for user in node.users if user in leader])
        if name_operator(node) in scheme.inherited | scheme.shared:
            given = [s.args[0] for s in node.all_input_nodes if "dequantize" in str(s.target)]
            sources = [s for s in given if isinstance(s, Node) and s in leader]
            join([*sources, *(user for user in node.users if user in leader)])
    groups: dict[Node, list[Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def is_rounding(node: Node) -> bool:
    """Say if a node turns an activation into integers."""
    return node.op == "call_function" and str(node.target) == "jettison.quantize_per_tensor.default"


def _list_restoring(node: Node) -> list[Node]:
    return [user for user in node.users if "dequantize" in str(user.target)]


def _levels_of(node: Node) -> Levels:
    low, high = node.args[3:5]
    assert isinstance(low, int) and isinstance(high, int)
    return Levels(low, high, False)


def _name_group(index: int) -> str:
    return f"activations.tensor{index}"


def _replace_activations(student: GraphModule, scheme: IntegerScheme) -> dict[Node, Node]:
    """Put learned quantizers in the place of the fixed ones; returns the step of what each new node gives."""
    graph, steps = student.graph, {}
    for index, group in enumerate(group_roundings(student, scheme)):
        stem, levels = _name_group(index), _levels_of(group[0])
        scale, zero = group[0].args[1:3]
        assert isinstance(scale, float) and isinstance(zero, int)
        names = [f"{stem}_{FIRST}", f"{stem}_{GROWTH}", f"{stem}_{PLACE}"]
        set_buffer(student, names[0], torch.tensor([scale], dtype=torch.float32))
        _set_parameter(student, names[1], torch.zeros(1))
        # A range that starts at zero stands for a ReLU: it keeps its end. Symmetric ones have zero point 0 by contract.
        moves = zero != levels.q_min and not scheme.activation.symmetric
        if moves:
            _set_parameter(student, names[2], torch.tensor([-zero / (levels.q_max - levels.q_min)]))
        with graph.inserting_before(group[0]):
            first = graph.get_attr(names[0])
            step = graph.call_function(find_step, (first, graph.get_attr(names[1])))
            ends = (levels.q_min, levels.q_max)
            if moves:
                offset = graph.call_function(find_offset, (first, graph.get_attr(names[2]), *ends))
            else:
                # A fixed zero point: the same ends, counted from it.
                offset, ends = None, (levels.q_min - zero, levels.q_max - zero)
        for node in group:
            with graph.inserting_before(node):
                learned = graph.call_function(round_activation, (node.args[0], step, offset, *ends))
            for restoring in _list_restoring(node):
                restoring.replace_all_uses_with(learned)
                steps[restoring] = step
    return steps


def _prepare_weight(student: GraphModule, folded: GraphModule, node: Node, spot: Spot) -> Node:
    """Put a layer's float weight and bias, steps and their growth into the student; returns its dequantized input."""
    found = read_weight(student, node)
    latent = _find(folded, spot.weight)
    if spot.form == "step":
        latent = _recover_weight(found, latent, spot)
        set_buffer(student, f"{spot.weight}_{FIRST}", found.scale)
        _set_parameter(student, f"{spot.weight}_{GROWTH}", torch.zeros_like(found.scale))
    elif latent is None:
        latent = _spread(found.scale, spot, found.integers) * found.integers
    _set_parameter(student, spot.weight, latent)
    if spot.bias is not None and found.bias is not None:
        _set_parameter(student, spot.bias, found.bias)
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _recover_weight(found: Weight, latent: Tensor | None, spot: Spot) -> Tensor:
    """Return float weights that round to the integers chosen: the original's where they do, else near to them."""
    scale, low, high = _spread(found.scale, spot, found.integers), spot.levels.q_min, spot.levels.q_max
    exact = found.integers * scale
    if latent is None or latent.shape != exact.shape:
        return exact
    wrong = torch.round(latent / scale).clamp(low, high) != found.integers
    if float(wrong.float().mean()) > 0.5:
        return exact  # other weights than these were rounded: the network was equalised before
    infinite = torch.full_like(scale, float("inf")).expand_as(exact)
    floor = torch.where(found.integers == low, -infinite, exact - EDGE * scale)
    ceiling = torch.where(found.integers == high, infinite, exact + EDGE * scale)
    return torch.where(wrong, torch.minimum(torch.maximum(latent, floor), ceiling), latent)


def _replace_weight(student: GraphModule, node: Node, spot: Spot, input_step: Node) -> None:
    graph = student.graph
    with graph.inserting_before(node):
        weight = graph.get_attr(spot.weight)
        if spot.form in COARSE:
            step = graph.call_function(find_coarse_step, (weight, spot.axis, spot.form))
            rounded = graph.call_function(round_coarse, (weight, spot.axis, spot.form))
        else:
            names = (f"{spot.weight}_{FIRST}", f"{spot.weight}_{GROWTH}")
            step = graph.call_function(find_step, tuple(map(graph.get_attr, names)))
            ends = (spot.levels.q_min, spot.levels.q_max)
            rounded = graph.call_function(round_weight, (weight, step, spot.axis, *ends))
        node.update_arg(1, rounded)
        if spot.bias is not None:
            bias = graph.get_attr(spot.bias)
            node.update_arg(2, graph.call_function(round_bias, (bias, input_step, step)))


def _spread(scale: Tensor, spot: Spot, like: Tensor) -> Tensor:
    return scale.view([-1 if a == spot.axis else 1 for a in range(like.ndim)])


def _find(module: nn.Module, name: str) -> Tensor | None:
    try:
        return read_attribute(module, name)
    except AttributeError:
        return None


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a copy of `value` at the dotted name as a parameter, replacing what stood there."""
    set_buffer(module, name, value)
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    delattr(owner, last)
    owner.register_parameter(last, nn.Parameter(value.detach().clone()))
