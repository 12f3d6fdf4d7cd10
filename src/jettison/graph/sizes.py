"""Calls of torch that take sizes: what each size must become in the pruned network.

One small function per family; `FUNCTIONS` names the functions a network calls, `NODE_FAMILY` the operators they become.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from jettison.graph.provenance import Demand, Journal, Place, Tagged, express
from jettison.graph.trace import shapes_of


@dataclass
class Call:
    """One intercepted call on sliced tensors; `function`, `args` and `kwargs` are put right in place.

    `nodes` are the nodes it became in the sliced graph, which know their sizes there (None where there is none to learn
    from).
    """

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    nodes: list[fx.Node | None]
    place: Place
    journal: Journal

    def need(self, value: int, target: int) -> int:
        """Ask that `value` become `target`, which is returned; a literal cannot, and is blamed on its submodule."""
        if isinstance(value, Tagged):
            self.journal.demands.append(Demand(express(value), target, self.place, self.journal.module))
        elif value != target:
            self.journal.blame(
                f"Pruning needs a size of {target} where the source gives {value}: a number, or another tensor's size. "
                f"It stands at {self.place}. "
                "Write -1, a size read from x.shape or an attribute of the module; or take the graph result."
            )
        return target

    def refuse(self, text: str, advice: str) -> None:
        """Note that this call cannot say what the pruned network needs; the caller goes on with what it does need."""
        self.journal.blame(f"{text} It stands at {self.place}. {advice}; or take the graph result.")

    def change(self, index: int, name: str, target: Callable[[Any], Any]) -> None:
        """Replace an argument given by position or by name; one that was left out stays so."""
        if len(self.args) > index:
            self.args[index] = target(self.args[index])
        elif name in self.kwargs:
            self.kwargs[name] = target(self.kwargs[name])


def list_slices(args: Any) -> list[tuple[int, slice]]:
    """List the bounded slices of an index with the dimension each applies to; none where the index is too involved."""
    x, index = args[0], args[1]
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, Tensor) and p.dtype == torch.bool for p in parts) or any(isinstance(p, list) for p in parts):
        return []
    consumed = sum(1 for p in parts if p is not None and p is not Ellipsis)
    found: list[tuple[int, slice]] = []
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += x.dim() - consumed
        elif part is not None:
            if isinstance(part, slice) and (part.start, part.stop) != (None, None) and part.step in (None, 1):
                found.append((dim, part))
            dim += 1
    return found


def _leave(call: Call) -> None:
    """All sizes of this call follow from its tensors."""


def _fix_shape(call: Call) -> None:
    """view, reshape, expand: the sizes are those of the output."""
    if call.nodes[0] is None:
        return
    shape = shapes_of(call.nodes[0])

    def put(sizes: Any) -> Any:
        # int(): a tagged size answers comparisons as the source's own were answered.
        return [s if int(s) == -1 else call.need(s, t) for s, t in zip(sizes, shape, strict=True)]

    if len(call.args) > 1 and isinstance(call.args[1], int) and not isinstance(call.args[1], bool):
        call.args[1:] = put(call.args[1:])
    for name in ("shape", "size"):
        call.change(1, name, lambda v: put(v) if isinstance(v, (tuple, list)) else v)


def _fix_constant(call: Call) -> None:
    """zeros, ones, full: as `_fix_shape`, with the sizes first unless a tensor's method is called."""
    if call.args and isinstance(call.args[0], Tensor):
        _fix_shape(call)
        return
    call.args.insert(0, None)
    _fix_shape(call)
    del call.args[0]


def _fix_unflatten(call: Call) -> None:
    if call.nodes[0] is None:
        return
    shape, x = shapes_of(call.nodes[0]), call.args[0]
    dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
    offset = dim + x.dim() if dim < 0 else dim
    call.change(2, "sizes", lambda v: [s if int(s) == -1 else call.need(s, shape[offset + i]) for i, s in enumerate(v)])


def _fix_groups(call: Call) -> None:
    node = call.nodes[0]
    if node is not None:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        assert isinstance(groups, int)
        call.change(6, "groups", lambda v: call.need(v, groups))


def _fix_layer_norm(call: Call) -> None:
    node = call.nodes[0]
    if node is None:
        return
    sizes = node.args[1]
    assert isinstance(sizes, (tuple, list))

    def put(value: Any) -> Any:
        given = [value] if isinstance(value, int) else list(value)
        return [call.need(s, t) for s, t in zip(given, sizes, strict=True)]

    call.change(1, "normalized_shape", put)


def _fix_group_norm(call: Call) -> None:
    node = call.nodes[0]
    if node is not None:
        groups = node.args[1]
        assert isinstance(groups, int)
        call.change(1, "num_groups", lambda v: call.need(v, groups))


def _fix_split(call: Call) -> None:
    """Split by a size or by several: the parts are those of the graph."""
    sizes = _part_sizes(call)
    if sizes is None:
        return

    def put(value: Any) -> Any:
        if not isinstance(value, int):
            return [call.need(s, t) for s, t in zip(value, sizes, strict=True)]
        if any(s != sizes[0] for s in sizes[:-1]) or sizes[-1] > sizes[0]:
            call.refuse(f"One size splits a tensor that pruning leaves in parts of {sizes}.", _LIST_SIZES)
            return sizes
        return call.need(value, sizes[0])

    for name in ("split_size_or_sections", "split_size", "split_sizes"):
        call.change(1, name, put)


def _fix_chunk(call: Call) -> None:
    """Chunk by a number: only even parts can be had."""
    sizes = _part_sizes(call)
    if sizes is None:
        return
    count = call.args[1] if len(call.args) > 1 else call.kwargs["chunks"]
    size = -(-sum(sizes) // int(count))
    if any(s != size for s in sizes[:-1]) or sizes[-1] > size:
        call.refuse(f"chunk cannot give the parts of {sizes} that pruning leaves.", _LIST_SIZES)
        x = call.args[0] if call.args else call.kwargs["input"]
        dim = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
        call.function, call.args, call.kwargs = torch.split, [x, sizes, dim], {}


_LIST_SIZES = "Write `x.split([a, b])` with sizes that are attributes of the module"


def _part_sizes(call: Call) -> list[int] | None:
    if call.nodes[0] is None:
        return None
    shapes = shapes_of(call.nodes[0])
    dim = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
    return [shape[dim] for shape in shapes]


def _fix_slices(call: Call) -> None:
    """x[a:b]: the bounds are those of the graph's slices, which come in the same order."""
    index = call.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    for (dim, part), node in zip(list_slices(call.args), call.nodes, strict=False):
        if node is not None:
            position = next(i for i, p in enumerate(parts) if p is part)
            parts[position] = _move_slice(call, part, node, call.args[0].shape[dim])
    call.args[1] = tuple(parts) if isinstance(index, tuple) else parts[0]


def _move_slice(call: Call, part: slice, node: fx.Node, size: int) -> slice:
    bounds = [node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in ((2, "start"), (3, "end"))]
    start, stop, _ = slice(*bounds).indices(size)

    def put(value: int | None, target: int, open_end: int) -> int | None:
        if value is None:
            if target == open_end:
                return None
            call.refuse(f"A slice without a bound must now end at {target}.", "Write both bounds")
            return target
        return call.need(value, target - size if value < 0 else target)

    return slice(put(part.start, start, 0), put(part.stop, stop, size), part.step)


def _fix_attention(call: Call) -> None:
    node = call.nodes[0]
    if node is None or call.kwargs.get("scale") is not None:
        return
    scale, size = node.kwargs.get("scale"), call.args[0].shape[-1] if call.args else call.kwargs["query"].shape[-1]
    if scale is not None and scale != size**-0.5:
        call.refuse(
            f"Attention's default scale follows the head's size, and pruning changes that to {size}.",
            f"Write `scale=self.scale` with a float attribute, here {scale:.6g}",
        )
        call.kwargs["scale"] = scale


Fix = Callable[[Call], None]


def _table() -> dict[Any, tuple[str, Fix]]:
    tensor = torch.Tensor
    rows: list[tuple[str, Fix, list[Any]]] = [
        ("reshape", _fix_shape, [tensor.view, tensor.reshape, torch.reshape]),
        ("reshape", _fix_unflatten, [tensor.unflatten, torch.unflatten]),
        ("reshape", _leave, [tensor.flatten, torch.flatten, tensor.view_as, tensor.reshape_as]),
        ("expand", _fix_shape, [tensor.expand, torch.broadcast_to, tensor.broadcast_to]),
        ("expand", _leave, [tensor.expand_as]),
        ("constant", _fix_constant, [torch.zeros, torch.ones, torch.full, torch.empty]),
        ("constant", _fix_constant, [tensor.new_zeros, tensor.new_ones, tensor.new_full, tensor.new_empty]),
        ("conv", _fix_groups, [torch.conv1d, torch.conv2d, torch.conv3d]),
        ("conv", _fix_groups, [torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d]),
        ("layer_norm", _fix_layer_norm, [F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm]),
        ("group_norm", _fix_group_norm, [F.group_norm, torch.group_norm]),
        ("split", _fix_split, [torch.split, tensor.split, torch.split_with_sizes, tensor.split_with_sizes]),
        ("split", _fix_chunk, [torch.chunk, tensor.chunk]),
        ("slice", _fix_slices, [tensor.__getitem__]),
        ("attention", _fix_attention, [F.scaled_dot_product_attention]),
    ]
    return {function: (family, fix) for family, fix, functions in rows for function in functions}


FUNCTIONS: dict[Any, tuple[str, Fix]] = _table()
"""The functions of torch that take sizes: the family of each, and what puts its sizes right."""

NODE_FAMILY: dict[str, str] = {
    name: family
    for family, names in (
        ("reshape", "view _unsafe_view reshape flatten unflatten"),
        ("expand", "expand"),
        ("constant", "zeros ones full empty new_zeros new_ones new_full new_empty"),
        ("conv", "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
        ("layer_norm", "layer_norm rms_norm"),
        ("group_norm", "group_norm"),
        ("split", "split split_with_sizes chunk"),
        ("slice", "slice"),
        ("attention", "scaled_dot_product_attention"),
    )
    for name in names.split()
}
"""The operator packets of the graph that belong to a family."""
