"""Clamping activations: where they cut, when a range does the same, and where they had better stand."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.fold import name_operator
from jettison.targets.integer import MOVES

FLOOR, CEILING = -float("inf"), float("inf")


def read_clamp(node: Node) -> tuple[float, float] | None:
    """Return the ends a clamping activation cuts at, or None if the node is none."""
    name = name_operator(node)
    if name == "aten.relu.default":
        return 0.0, CEILING
    if name == "aten.relu6.default":
        return 0.0, 6.0
    if name not in ("aten.hardtanh.default", "aten.clamp.default") or node.kwargs:
        return None
    defaults = (-1.0, 1.0) if name == "aten.hardtanh.default" else (FLOOR, CEILING)
    ends = [*node.args[1:], *defaults[len(node.args) - 1 :]]
    if not all(isinstance(end, (int, float)) or end is None for end in ends):
        return None
    low, high = (default if end is None else float(end) for end, default in zip(ends, (FLOOR, CEILING), strict=True))  # type: ignore[arg-type]
    return low, high


def find_clamp(node: Node) -> tuple[float, float]:
    """Return the ends that the activation after a layer of the float graph cuts at; infinities where there is none."""
    users = list(node.users)
    ends = read_clamp(users[0]) if len(users) == 1 else None
    return (FLOOR, CEILING) if ends is None else ends


def drop_covered(quantizing: Node) -> None:
    """Take out the activation before a quantization whose own saturation does the same."""
    source, scale, zero_point, q_min, q_max = quantizing.args[:5]
    assert isinstance(source, Node)
    ends = read_clamp(source)
    if ends is None or len(source.users) != 1:
        return
    assert (
        isinstance(scale, float) and isinstance(zero_point, int) and isinstance(q_min, int) and isinstance(q_max, int)
    )
    low, high = (q_min - zero_point) * scale, (q_max - zero_point) * scale
    # Half a step over the end still rounds to the same last integer.
    if low > ends[0] - scale / 2 and high < ends[1] + scale / 2:
        quantizing.update_arg(0, source.args[0])


def merge_clamps(module: GraphModule) -> None:
    """Let readers of one tensor's clamped numbers share one activation, in place, as the branches of NASNet's cells."""
    known: dict[tuple[object, ...], Node] = {}
    for node in list(module.graph.nodes):
        if read_clamp(node) is None:
            continue
        first = known.setdefault((name_operator(node), *node.args), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    module.recompile()


def hoist_clamps(module: GraphModule) -> None:
    """Let ReLU and ReLU6 clamp before numbers are pooled, padded or laid out anew, not after, in place.

    The result is the same, since clamping keeps the order of numbers. But there the layer's own range covers it; after
    a pooling it would be a second rounding in a row, which ONNX Runtime merges into one that nobody asked for. Other
    ends than 0 are not sure to be covered, and a layer with an activation left in between runs in float.
    """
    for clamp in list(module.graph.nodes):
        while (move := _find_move(clamp)) is not None:
            source = move.args[0]
            assert isinstance(source, Node)
            with module.graph.inserting_before(move):
                earlier = module.graph.create_node("call_function", clamp.target, (source, *clamp.args[1:]))
            earlier.meta = {**clamp.meta, "val": source.meta.get("val")}
            move.update_arg(0, earlier)
            clamp.replace_all_uses_with(move)
            module.graph.erase_node(clamp)
            clamp = earlier
    module.recompile()


def _find_move(clamp: Node) -> Node | None:
    """Return what moves a clamp's numbers before it, where it may as well stand before that."""
    ends = read_clamp(clamp)
    move = clamp.args[0] if ends is not None and ends[0] == 0 else None
    if not isinstance(move, Node) or name_operator(move) not in MOVES or len(move.users) != 1:
        return None
    source = move.args[0]
    if not isinstance(source, Node) or len(source.users) != 1 or not isinstance(source.meta.get("val"), Tensor):
        return None
    return move if keeps_values(move) else None


def keeps_values(node: Node) -> bool:
    """Say if all that a moving operator puts into its output is its input, or zero, which every range holds exactly."""
    if name_operator(node) == "aten.constant_pad_nd.default":
        return node.args[2:] in ((), (0,), (0.0,))
    if name_operator(node) == "aten.pad.default":
        return node.args[2:] in ((), ("constant",), ("constant", None), ("constant", 0), ("constant", 0.0))
    return True
