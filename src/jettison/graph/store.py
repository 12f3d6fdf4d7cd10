"""A flat graph as JSON and its tensors as safetensors: readable, diffable, and loaded without running any code.

The JSON names tensor operators and plain arguments only; loading resolves names in `torch.ops.aten` (and a few other
namespaces of tensor operators) and nothing else, so a file from elsewhere cannot make anything else run.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import CheckpointError, ExportError
from jettison.core.plain import write_bytes
from jettison.graph.subgraphs import OPERATORS, find_operator, list_regions, runs_graphs
from jettison.graph.trace import get_tensor

FORMAT = "jettison.graph/1"

_BUILTINS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        *("getitem", "mul", "add", "sub", "floordiv", "truediv", "neg", "mod", "pow"),
        *("and_", "or_", "eq", "ne", "ge", "gt", "le", "lt"),
    )
}
_BUILTINS |= {name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")}
_NAMESPACES = ("aten", "torchvision", "quantized_decomposed", "jettison")
"""Whoever loads must have made torch know the others: torchvision's operators (regions of interest, deformed
convolutions) are there once it has been imported, those on integers after `quantization.storing.register_operators`."""


def save_graph(module: fx.GraphModule, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, folder: Path) -> None:
    """Write `model.json` and `model.safetensors` into `folder`, each whole or not at all.

    Raises ExportError for an operator that cannot be named as data, StorageError where a file cannot be written.
    """
    write_json_graph(module, in_spec, out_spec, folder / "model.json")
    save_tensors(module, folder / "model.safetensors")


def write_json_graph(module: fx.GraphModule, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, path: Path) -> None:
    """Write the graph without its tensors."""
    write_bytes((json.dumps(describe_graph(module, in_spec, out_spec), indent=1) + "\n").encode(), path)


def describe_graph(module: fx.GraphModule, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> dict[str, Any]:
    """Return the graph without its tensors as plain JSON; raises ExportError for an operator that is not listed."""
    try:
        specs = [json.loads(pytree.treespec_dumps(spec)) for spec in (in_spec, out_spec)]
        for spec in specs:
            _check_spec(spec)
    except (NotImplementedError, TypeError) as error:
        raise ExportError(
            f"The network's inputs or outputs are nested in a way that cannot be saved: {error}. "
            "Return tuples, lists or dicts."
        ) from error
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "in_spec": specs[0],
        "out_spec": specs[1],
        "parameters": sorted(name for name, _ in module.named_parameters(remove_duplicate=False)),
        **_describe_layouts(module),
        **_dump_graph(module),
    }


def _describe_layouts(module: nn.Module) -> dict[str, Any]:
    """Return the strides of tensors that lie in memory in another order: kernels sum, and round, in that order."""
    found = {}
    for name, tensor in _named_tensors(module).items():
        order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        if not tensor.is_contiguous() and tensor.permute(order).is_contiguous():
            found[name] = list(tensor.stride())
    return {"strides": found} if found else {}


def save_tensors(module: nn.Module, path: Path) -> None:
    """Write parameters and buffers as safetensors; tensors that share memory are written once under each name."""
    from safetensors.torch import save

    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in _named_tensors(module).items():
        if id(tensor) in seen:
            shared[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    # One key only: safetensors writes several in an order that differs from run to run.
    metadata = {"jettison.shared": json.dumps(shared, sort_keys=True)}
    write_bytes(save(tensors, metadata), path)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer, also those that `state_dict` leaves out (constants of the graph)."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; raises CheckpointError where the file is corrupt or missing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Kernels round differently on memory that is not aligned as torch aligns its own.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            shared = json.loads((file.metadata() or {}).get("jettison.shared", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}. Compute or copy it anew."
        ) from error
    try:
        return {**tensors, **{name: tensors[original] for name, original in shared.items()}}
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} shares tensors it does not hold: {error!r}. Compute or copy it anew.") from error


def load_graph(folder: Path) -> tuple[fx.GraphModule, pytree.TreeSpec, pytree.TreeSpec]:
    """Read a saved graph; returns the flat module in eval mode and the specs of its nesting."""
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Give the folder that `save` wrote.") from error
    return restore_graph(data, read_tensors(folder / "model.safetensors"), path)


def restore_graph(
    data: Any, tensors: Mapping[str, Tensor], path: Path
) -> tuple[fx.GraphModule, pytree.TreeSpec, pytree.TreeSpec]:
    """Return what `describe_graph` described, over its tensors; `path` is where it was read, for messages."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a graph of format {FORMAT!r}. Give the folder that `save` wrote.")
    try:
        module = _build_module(data, tensors)
        specs = [_load_spec(data[key], path) for key in ("in_spec", "out_spec")]
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path} does not describe a graph: {error!r}. Compute or copy it anew.") from error
    return module, specs[0], specs[1]


def _build_module(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    return _build_graph(build_tree(_lay_out(tensors, data.get("strides", {})), set(data["parameters"])), data).eval()


def _lay_out(tensors: Mapping[str, Tensor], strides: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Return the tensors in the order in memory that they were saved from; shared ones stay shared."""
    laid: dict[int, Tensor] = {}
    for name, order in strides.items():
        tensor = tensors[name]
        if id(tensor) not in laid:
            empty = torch.empty_strided(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
            laid[id(tensor)] = empty.copy_(tensor)
    return {name: laid.get(id(tensor), tensor) for name, tensor in tensors.items()}


def _build_graph(root: nn.Module, data: Mapping[str, Any]) -> fx.GraphModule:
    """Build a graph over the tensors of `root`, and the sub-graphs of its nodes before it."""
    for name, inner in data.get("graphs", {}).items():
        if not name.isidentifier():
            raise KeyError(f"{name!r} is no name of a sub-graph")
        root.add_module(name, _build_graph(root._modules.get(name) or nn.Module(), inner))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        args = _load_argument(entry["args"], nodes)
        kwargs = {k: _load_argument(v, nodes) for k, v in entry["kwargs"].items()}
        kind, target = entry["op"], entry["target"]
        _check_names(entry)
        if kind == "call_function":
            target = _find_operator(target)
        if kind == "output" or isinstance(target, torch._ops.HigherOrderOperator):
            # Autograd does not look at a branch's operands and results in lists.
            args = [tuple(a) if isinstance(a, list) else a for a in args]
        if kind == "get_attr" and not isinstance(_find(root, target), (Tensor, fx.GraphModule)):
            raise KeyError(f"tensor {target!r} is not in model.safetensors")
        nodes[entry["name"]] = graph.create_node(kind, target, tuple(args), kwargs, name=entry["name"])
    return fx.GraphModule(root, graph)


def _find(root: nn.Module, name: str) -> Any:
    """Return the tensor or sub-graph of that name; None where there is none."""
    owner: Any = root
    *path, leaf = name.split(".")
    for part in path:
        owner = owner._modules.get(part, nn.Module())
    return {**owner._modules, **owner._parameters, **owner._buffers}.get(leaf)


def _check_names(entry: Mapping[str, Any]) -> None:
    """Refuse whatever is no plain name: torch.fx writes names into Python source and runs it."""
    if entry["op"] not in ("placeholder", "get_attr", "call_function", "output"):
        raise KeyError(f"a graph may not hold a {entry['op']!r} node")
    plain = [entry["name"], *entry["kwargs"]]
    if entry["op"] == "placeholder":
        plain.append(entry["target"])
    for name in plain:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise KeyError(f"{name!r} is no name")
    # Parts of a module path may be any text (ModuleDict allows it), but must not end the string they stand in.
    if entry["op"] == "get_attr" and (not entry["target"].isprintable() or set(entry["target"]) & set("\"'\\")):
        raise KeyError(f"{entry['target']!r} is no path of a tensor")


def _check_spec(spec: Any) -> None:
    """Refuse containers whose description makes torch import modules by name."""
    if "defaultdict" in json.dumps(spec):
        raise TypeError("inputs and outputs cannot be nested in a defaultdict")


def _load_spec(spec: Any, path: Path) -> pytree.TreeSpec:
    _check_spec(spec)
    try:
        return pytree.treespec_loads(json.dumps(spec))
    except NotImplementedError as error:  # a class of a library's own, which registers it when it is imported
        raise CheckpointError(
            f"{path} nests inputs or outputs in a class that nobody has registered: {error} "
            "Import the module that defines it first."
        ) from error


def build_tree(tensors: Mapping[str, Tensor], parameters: set[str]) -> nn.Module:
    """Return bare modules that hold the tensors under their dotted names, those named as parameters."""
    root = nn.Module()
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if name in parameters:
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
            owner.register_parameter(leaf, parameter)
        else:
            owner.register_buffer(leaf, tensor)
    return root


def _dump_graph(module: fx.GraphModule) -> dict[str, Any]:
    """Describe the nodes of a graph and, by the name it hangs under, each sub-graph that a node runs."""
    inner = {r.name: _dump_graph(r.module) for n in module.graph.nodes for r in list_regions(module, n)}
    nodes = [_dump_node(node) for node in module.graph.nodes]
    return {"nodes": nodes, "graphs": inner} if inner else {"nodes": nodes}


def _dump_node(node: fx.Node) -> dict[str, Any]:
    target = str(node.target)
    if node.op == "call_function":
        target = _name_operator(node)
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": _dump_argument(list(node.args)),
        "kwargs": {k: _dump_argument(v) for k, v in node.kwargs.items()},
    }


def _name_operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        if name.split(".")[0] in _NAMESPACES:
            return name
    if runs_graphs(node):
        return f"higher_order.{node.target}"
    for name, function in _BUILTINS.items():
        if node.target is function:
            return f"operator.{name}"
    raise ExportError(f"The graph calls {node.target}, which cannot be saved as data. Save the artefact instead.")


def _find_operator(name: str) -> Any:
    space, *rest = name.split(".")
    if space == "operator":
        return _BUILTINS[rest[0]]
    if space == "higher_order" and len(rest) == 1 and rest[0] in OPERATORS:
        return find_operator(rest[0])
    if space not in _NAMESPACES or len(rest) != 2:
        raise KeyError(f"operator {name!r} is not one a graph may call")
    return getattr(getattr(getattr(torch.ops, space), rest[0]), rest[1])


_KINDS: dict[type, str] = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout"}


def _dump_argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_dump_argument(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    for kind, name in _KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ExportError(f"A graph argument of type {type(value).__name__} cannot be saved as data.")


def _load_argument(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_load_argument(v, nodes) for v in value]
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        if kind == "node":
            return nodes[text]
        if kind == "float":
            return float(text)
        if kind == "device":
            return torch.device(text)
        found = getattr(torch, text)
        if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            raise TypeError(f"{text!r} is no {kind}")
        return found
    return value


def load_tensors_into(module: nn.Module, path: Path) -> None:
    """Load saved tensors into a module of the very same names and shapes; raises CheckpointError where they differ."""
    tensors = read_tensors(path)
    own = _named_tensors(module)
    wrong = sorted(set(tensors) ^ set(own)) or [n for n, t in own.items() if t.shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"{path} belongs to another network: {len(wrong)} tensors differ, first {wrong[0]!r}.")
    with torch.no_grad():
        for name, tensor in own.items():
            get_tensor(module, name).data = tensors[name].to(tensor.device)


__all__ = ["load_graph", "load_tensors_into", "read_tensors", "save_graph", "save_tensors"]
