"""Small weights, float activations: linear layers' weights as 8- or 4-bit integers in groups, each with its own scale.

No calibration: only weights are looked at. Pays where reading weights is what takes the time, as it is for one row or a
few; the runtimes' kernels round the activations in the same groups to 8 bits on the way.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.core.errors import InputError, NonFiniteError, UnknownName
from jettison.quantization.constants import fold_constants
from jettison.quantization.convert import Quantized, Site
from jettison.quantization.fold import (
    copy_graph,
    find_layers,
    find_weight,
    name_layer,
    name_operator,
    number_name,
    read_attribute,
    set_buffer,
    unshare,
)
from jettison.quantization.products import write_linear
from jettison.quantization.ranges import choose_scale, choose_weight_scale
from jettison.quantization.switches import WEIGHTED
from jettison.targets.integer import Levels, fake_quantize, quantize_linear
from jettison.targets.operators import GROUP_KERNELS, GroupKernels, expand_groups, groups_operator

LINEAR = frozenset({"aten.linear.default"})
RECURRENT = frozenset({"aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"})
"""Listed beside the linear layers; only `kind="dynamic"` has integers for them."""
GROUPS = (16, 32, 64, 128, 256)
"""Group sizes that the runtimes' kernels take."""
SHARES = 32
SMALLEST_SHARE = 0.7
"""Asymmetric ranges are tried from the whole span down to this share of it; four bits clip little."""


def quantize_weights(
    module: GraphModule,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    exclude: Collection[str] = (),
    kernels: GroupKernels = GROUP_KERNELS["onnxruntime"],
) -> Quantized:
    """Return a copy of a flat graph whose linear layers hold integers of 4 or 8 `bits` in groups of `group` inputs.

    The last group may be smaller. Each group has the scale (and, unless `symmetric`, zero point) of least squared
    error. `exclude` names layers that stay float. `kernels` are the runtime's: the module rounds activations as they
    do; where they take whole groups only, a layer whose width is no multiple of `group` gets the next smaller group
    that divides it, and stays float where none does. A weight that something else reads too, such as a tied embedding,
    stays float there. Raises InputError for bits or groups that no kernel takes, UnknownName for an unknown layer,
    NonFiniteError for NaN or infinity in a weight.
    """
    if bits not in (4, 8) or group not in GROUPS:
        raise InputError(
            f"There is no kernel for {bits} bits in groups of {group}. "
            f"Weight-only layers have 4 or 8 bits and groups of {', '.join(map(str, GROUPS))}. Choose among these."
        )
    copied = copy_graph(module).requires_grad_(False)
    fold_constants(copied)
    layers = pick_layers(copied, exclude)
    for name, node in list(layers.items()):
        weight_node = find_weight(node)
        assert weight_node is not None
        weight = read_weight(copied, weight_node)
        size = choose_group(weight.shape[1], group) if kernels.whole else group
        if size is None:
            del layers[name]
            continue
        integers, scale, zero_point = round_weight(weight.t(), bits=bits, group=size, symmetric=symmetric)
        stem = free_name(copied, str(weight_node.target), node)
        parts: dict[str, Tensor | None] = {"": integers, "_scale": scale, "_zero_point": zero_point}
        placed = place_constants(copied, node, stem, parts)
        bias = node.args[2] if len(node.args) > 2 else None
        node.args = (node.args[0], *placed, bias, size, bits, find_rounding(kernels, size))
        node.target = groups_operator()
    finish(copied)
    return Quantized(copied, list_kinds(module, layers, bits))


def find_rounding(kernels: GroupKernels, group: int) -> int:
    """Return the size of the groups in which a runtime rounds activations, 0 where it does not."""
    if kernels.rounding is None:
        return group
    return kernels.rounding if group % kernels.rounding == 0 else 0


def choose_group(width: int, group: int) -> int | None:
    """Return the largest group size up to `group` that divides `width`, None where none does."""
    return max((size for size in GROUPS if size <= group and width % size == 0), default=None)


def pick_layers(module: GraphModule, exclude: Collection[str]) -> dict[str, Node]:
    """Un-share the parameters of all linear layers, in place, and return those that are not excluded, by name."""
    write_linear(module)
    unshare(module, LINEAR)
    layers = find_layers(module, LINEAR)
    for name in exclude:
        if name not in layers:
            raise UnknownName("linear layer", name, layers)
    return {name: node for name, node in layers.items() if name not in exclude}


def find_recurrent(module: GraphModule) -> dict[str, Node]:
    """Return each call of a recurrent layer over whole sequences, by its module's name; "lstm@2" is a second call."""
    found: dict[str, Node] = {}
    for node in module.graph.nodes:
        weights = node.args[2] if name_operator(node) in RECURRENT else ()
        if (
            isinstance(weights, (list, tuple))
            and weights
            and isinstance(weights[0], Node)
            and weights[0].op == "get_attr"
        ):
            module_name = str(weights[0].target).rpartition(".")[0]
            found[name_layer(module_name or name_operator(node).split(".")[1], found)] = node
    return found


def read_weight(module: GraphModule, node: Node) -> Tensor:
    """Return a weight as float32; raises NonFiniteError."""
    weight = read_attribute(module, str(node.target)).detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"The network's {str(node.target)!r} holds NaN or infinity. It cannot be rounded to integers. "
            "Load weights from before the training diverged."
        )
    return weight


def free_name(module: GraphModule, name: str, reader: Node) -> str:
    """Return the name under which a layer's integers are stored: its weight's own, unless others read that too."""
    count, free = 1, name
    readers = {u for n in module.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users}
    while readers - {reader}:
        count += 1
        free = number_name(name, count)
        readers = {u for n in module.graph.nodes if n.op == "get_attr" and n.target == free for u in n.users}
    return free


def place_constants(
    module: GraphModule, before: Node, stem: str, parts: dict[str, Tensor | None]
) -> tuple[Node | None, ...]:
    """Store tensors as `stem` with their suffixes, and return the nodes that read them; None stays None."""
    placed: list[Node | None] = []
    for suffix, value in parts.items():
        if value is None:
            placed.append(None)
            continue
        set_buffer(module, stem + suffix, value)
        with module.graph.inserting_before(before):
            placed.append(module.graph.get_attr(stem + suffix))
    return tuple(placed)


def finish(module: GraphModule) -> None:
    """Drop what nobody reads any more, and compile."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    held = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in held:
            parent, _, last = name.rpartition(".")
            delattr(module.get_submodule(parent), last)
    module.recompile()


def list_kinds(module: GraphModule, layers: Collection[str], bits: int) -> tuple[Site, ...]:
    """Return all layers with weights, linear, recurrent and other, and the bits of their weights."""
    copied = copy_graph(module)
    fold_constants(copied)
    write_linear(copied)
    unshare(copied, LINEAR)
    names = {node: name for name, node in {**find_layers(copied, WEIGHTED), **find_recurrent(copied)}.items()}
    ordered = [names[node] for node in copied.graph.nodes if node in names]
    return tuple(Site(name, bits if name in layers else 32) for name in ordered)


def round_weight(weight: Tensor, *, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight `(inputs, outputs)` in groups of inputs; returns integers, scales and zero points.

    Integers are int8 where `symmetric`, else uint8; scales and zero points are `(groups, outputs)`.
    """
    size, outputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -size % group))
    rows = padded.unflatten(0, (-1, group)).transpose(1, 2).reshape(-1, group)
    if symmetric:
        levels = Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, True)
        scale = choose_weight_scale(rows, 0, levels).view(-1, outputs)
        zero_point = None
    else:
        levels = Levels(0, 2**bits - 1, False)
        scale, shift = _search_range(rows, levels)
        scale, zero_point = scale.view(-1, outputs), shift.view(-1, outputs)
    shift_all: Tensor | int = 0 if zero_point is None else expand_groups(zero_point, group, size)
    integers = quantize_linear(weight, expand_groups(scale, group, size), shift_all, levels)
    stored = torch.int8 if symmetric else torch.uint8
    return integers.to(stored), scale.contiguous(), None if zero_point is None else zero_point.to(stored).contiguous()


def _search_range(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(1), rows.amax(1)
    least = torch.full_like(low, float("inf"))
    scale, zero_point = choose_scale(low, high, levels)
    for share in torch.linspace(1.0, SMALLEST_SHARE, SHARES):
        step, shift = choose_scale(low * share, high * share, levels)
        error = (fake_quantize(rows, step[:, None], shift[:, None], levels) - rows).square().sum(1)
        better = error < least
        scale, zero_point = torch.where(better, step, scale), torch.where(better, shift, zero_point)
        least = torch.minimum(error, least)
    return scale, zero_point
