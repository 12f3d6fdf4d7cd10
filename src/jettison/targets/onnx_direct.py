"""A flat graph written as ONNX operator by operator, without tracing it a second time.

`torch.onnx.export` traces, decomposes and rewrites, which takes longer than calibrating a small network, and minutes
for one of many operators. Our graphs are flat already, so each of their operators is looked up in FORMS. A graph with
an operator that is not there is left to `torch.onnx.export`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    from torch import Tensor
    from torch.fx import GraphModule, Node

IR_VERSION = 10
"""What `torch.onnx.export` writes for opset 18."""


LARGE = 2**16
"""So many numbers may be written out in place of what makes them."""


class NoForm(Exception):
    """There is no form for an operator, or for what it is called with; `write` then gives None."""


@dataclass(frozen=True)
class Kind:
    """What is known of a value: its type, and its sizes, None where they change with the batch.

    `is_batch` says for each size whether it is the batch itself.
    """

    dtype: Any
    sizes: tuple[int | None, ...]
    is_batch: tuple[bool, ...]


@dataclass
class Draft:
    """The file as it grows: `names` are the ONNX values of the graph's nodes, a list where a node gives several."""

    module: GraphModule
    kinds: Mapping[Node, Any]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    names: dict[Node, Any] = field(default_factory=dict)
    known: dict[Any, str] = field(default_factory=dict)
    made: dict[Any, list[str]] = field(default_factory=dict)
    batch_source: str = ""

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append an operator of one output, or find the one that computes the same; returns the output's name."""
        return self.add_several(operator, inputs, 1, **attributes)[0]

    def add_several(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append an operator of so many outputs, or find the one that computes the same; returns their names."""
        from onnx import helper

        key = (operator, tuple(inputs), tuple((k, str(v)) for k, v in sorted(attributes.items())))
        if key not in self.made:
            # Names that no module or input can have.
            names = [f"value {len(self.nodes)} {place}" for place in range(outputs)]
            self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
            self.made[key] = names
        return self.made[key]

    def hold(self, value: Any, dtype: Any) -> str:
        """Return the name of a constant."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"constant {len(self.constants)}"
            self.constants[self.known[key]] = array
        return self.known[key]

    def hold_sizes(self, sizes: Sequence[int]) -> str:
        """Return the name of a constant list of whole numbers."""
        return self.hold(list(sizes), np.int64)

    def kind(self, node: Any) -> Kind:
        """Return what is known of a node's tensor."""
        found = self.kinds.get(node)
        if not isinstance(found, Kind):
            raise NoForm(f"{node} is no tensor")
        return found

    def read(self, value: Any, dtype: Any = None) -> str:
        """Return the name of an argument as `dtype` (a torch type): a node's value, cast if need be, or a number."""
        from torch.fx import Node

        if isinstance(value, Node):
            name = self.names.get(value)
            if not isinstance(name, str):
                raise NoForm(f"{value} is no tensor")
            if dtype is not None and self.kind(value).dtype != dtype:
                return self.add("Cast", [name], to=to_onnx(dtype))
            return name
        if isinstance(value, (bool, int, float)) and dtype is not None:
            return self.hold(value, to_numpy(dtype))
        raise NoForm(f"the argument {value!r}")


def to_numpy(dtype: Any) -> Any:
    """Return numpy's name for a torch type."""
    import torch

    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError as error:
        raise NoForm(str(dtype)) from error


def to_onnx(dtype: Any) -> int:
    """Return ONNX's number for a torch type."""
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(to_numpy(dtype)))


def write(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: bool,
    opset: int,
) -> onnx.ModelProto | None:
    """Return the graph as ONNX with its batch free where `dynamic`, or None where an operator has no form here."""
    try:
        return _write(module, inputs, input_names, output_names, dynamic, opset)
    except NoForm:
        return None


def _write(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: bool,
    opset: int,
) -> onnx.ModelProto:
    import torch
    from onnx import helper, numpy_helper

    from jettison.targets.onnx_forms import FORMS

    for node in module.graph.nodes:
        if node.op == "get_attr" and not isinstance(attrgetter(str(node.target))(module), torch.Tensor):
            raise NoForm(f"{node.target}, a graph inside the graph")
    draft = Draft(module, find_kinds(module, inputs, dynamic), batch_source=input_names[0])
    fixed = fold_constants(module, draft.kinds)
    entries = iter(input_names)
    outputs: list[Any] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            draft.names[node] = next(entries)
        elif node.op == "get_attr":
            name = str(node.target)
            draft.constants[name] = draft.constants.get(name, _read_constant(module, name))
            draft.names[node] = name
        elif node.op == "output":
            outputs = list(node.args[0])
        elif draft.kinds[node] is None or _is_size(draft.kinds[node]):
            continue  # an assertion of the tracer's; or a size, which is read off the kinds
        elif node in fixed:
            if (value := fixed[node]) is not None:
                draft.names[node] = draft.hold(value, value.dtype)
        elif (form := FORMS.get(str(node.target))) is None:
            raise NoForm(str(node.target))
        else:
            try:
                draft.names[node] = form(draft, node, *node.args, **node.kwargs)
            except TypeError as error:  # an argument that the form does not know
                raise NoForm(f"{node.target}: {error}") from error
    for node, name in zip(outputs, output_names, strict=True):
        draft.nodes.append(helper.make_node("Identity", [draft.read(node)], [name]))
    _drop_identities(draft, output_names)
    nodes = _list_used(draft.nodes, output_names)
    used = {value for node in nodes for value in node.input}
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    graph = helper.make_graph(
        nodes,
        "jettison",
        [_describe(name, draft.kind(node)) for name, node in zip(input_names, places, strict=True)],
        [_describe(name, draft.kind(node)) for name, node in zip(output_names, outputs, strict=True)],
        [numpy_helper.from_array(array, name) for name, array in draft.constants.items() if name in used],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION, producer_name="jettison"
    )


def fold_constants(module: GraphModule, kinds: Mapping[Node, Any]) -> dict[Node, np.ndarray[Any, Any] | None]:
    """Return the numbers of what hangs on no input, for those that something else reads; None for those in between.

    What is stored as integers stays so, and what would be larger than what it is made from is left to the runtime.
    """
    import torch
    from torch.fx.node import map_arg

    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attrgetter(str(node.target))(module)
            continue
        sources = node.all_input_nodes
        if node.op != "call_function" or not isinstance(kinds[node], Kind) or any(s not in values for s in sources):
            continue
        name = str(node.target)
        if not name.startswith("aten.") or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if math.prod(size or 1 for size in kinds[node].sizes) > max([LARGE, *(values[s].numel() for s in sources)]):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
    found: dict[Node, np.ndarray[Any, Any] | None] = {}
    for node, value in values.items():
        if node.op == "call_function":
            to_numpy(value.dtype)
            is_read = any(user not in values for user in node.users)
            found[node] = value.detach().cpu().contiguous().numpy() if is_read else None
    return found


def find_kinds(module: GraphModule, inputs: tuple[Tensor, ...], dynamic: bool) -> dict[Node, Any]:
    """Return types and sizes by running the graph without data, with two batch sizes where the batch is free."""
    rows = [len(x) for x in inputs]
    try:
        first = _run_on_meta(module, inputs, rows)
        second = _run_on_meta(module, inputs, [n + 1 for n in rows]) if dynamic else first
    except Exception as error:  # whatever a shape rule does not like, the other writer is asked
        raise NoForm(str(error)) from error
    batch = rows[0] if dynamic else -1
    return {node: _join(first[node], second[node], batch) for node in first}


def _run_on_meta(module: GraphModule, inputs: tuple[Tensor, ...], rows: Sequence[int]) -> dict[Node, Any]:
    import torch
    from torch.fx.node import map_arg

    values: dict[Node, Any] = {}
    feed = (torch.empty((n, *x.shape[1:]), dtype=x.dtype, device="meta") for n, x in zip(rows, inputs, strict=True))
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = attrgetter(str(node.target))(module).to("meta")
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                args = [torch.device("meta") if isinstance(a, torch.device) else a for a in args]
                values[node] = node.target(*args, **{k: "meta" if k == "device" else v for k, v in kwargs.items()})
    return values


def _join(first: Any, second: Any, batch: int) -> Any:
    import torch

    if isinstance(first, torch.Tensor):
        pairs = list(zip(first.shape, second.shape, strict=True))
        sizes = tuple(a if a == b else None for a, b in pairs)
        return Kind(first.dtype, sizes, tuple((a, b) == (batch, batch + 1) for a, b in pairs))
    if isinstance(first, (list, tuple)):
        return [_join(a, b, batch) for a, b in zip(first, second, strict=True)]
    return first


def _is_size(kind: Any) -> bool:
    return isinstance(kind, (bool, int, float))


def _read_constant(module: GraphModule, name: str) -> np.ndarray[Any, Any]:
    value: Tensor = attrgetter(name)(module).detach().cpu()
    to_numpy(value.dtype)
    return value.numpy()


def _describe(name: str, kind: Kind) -> onnx.ValueInfoProto:
    from onnx import helper

    sizes = ["batch" if batch else size for size, batch in zip(kind.sizes, kind.is_batch, strict=True)]
    return helper.make_tensor_value_info(name, to_onnx(kind.dtype), sizes)


def _drop_identities(draft: Draft, output_names: Sequence[str]) -> None:
    """Give a value its output's name at once, where nothing else but that output is in the way."""
    ends = draft.nodes[-len(output_names) :]
    makers = {output: node for node in draft.nodes[: -len(output_names)] for output in node.output}
    for end in ends:
        old, new = end.input[0], end.output[0]
        maker = makers.get(old)
        if maker is None:
            continue  # an input, a constant, or a value that is an output already
        draft.nodes.remove(end)
        for node in draft.nodes:
            node.input[:] = [new if value == old else value for value in node.input]
        maker.output[:] = [new if value == old else value for value in maker.output]


def _list_used(nodes: Sequence[onnx.NodeProto], output_names: Sequence[str]) -> list[onnx.NodeProto]:
    wanted, kept = set(output_names), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
