"""The eager result: the caller's own module class with sliced tensors and integer attributes put right.

The graph result is always possible; this one where the user's source can express it. Attributes are found, not listed:
the forward runs twice with tagged integers (`provenance`), once as it was and once with sliced tensors, and every call
that takes sizes is matched to its node in the graph, which says what those sizes must become.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import CheckpointError, FixedSize
from jettison.graph.axes import Keeps
from jettison.graph.groups import Graph
from jettison.graph.matching import CallNodes, TaggedRun, run_watched
from jettison.graph.provenance import (
    Source,
    read_attributes,
    solve_demands,
    write_attributes,
)
from jettison.graph.rewrite import slice_graph
from jettison.graph.trace import Batch, Traced, get_tensor, run_nodes

EAGER_TOLERANCE = 1e-10
"""Largest relative difference in float64 between the eager and the graph result: the same sums, in the same order."""
EAGER_TOLERANCE_OWN_TYPE = 1e-4
"""The same where the graph holds constants of its own type and so runs in that only; float32 rounds at 6e-8 per sum."""


@dataclass(frozen=True)
class Eager:
    """The caller's own module, pruned, and what was changed in it beside its tensors.

    `attributes` is plain JSON: a list of `{"module", "name", "value"}`; `rebuild` takes it.
    """

    module: nn.Module
    attributes: list[dict[str, Any]]


def slice_module(model: nn.Module, graph: Graph, keeps: Keeps) -> Eager:
    """Return a copy of `model` without the dropped positions: same class, same names; the model is not changed.

    `graph` must be traced from `model`. The copy's output is compared with that of `slice_graph` on the example
    inputs, in float64 wherever the graph runs in it. Raises FixedSize, with the user's line, where the source cannot
    express the pruned network.
    """
    sliced = slice_graph(graph, keeps)
    varied = _vary_constants(model, sliced)
    proof = _run_sliced(sliced, graph.traced, varied)
    calls = CallNodes(graph.module, sliced, proof.shapes)
    before = TaggedRun(_copy_module(model), calls, graph.traced)
    before.run(None)
    result = _copy_module(model)
    _place_tensors(result, _changed_tensors(result, sliced))
    after = TaggedRun(_copy_module(result), calls, graph.traced)
    after.run(before)
    old = read_attributes(result)
    new = solve_demands(after.journal.demands, old)
    reached = before.journal.reached | after.journal.reached | new.keys()
    described = {s: v for s, v in old.items() if s not in reached and not s.name.startswith("_")}
    new |= _describe(described, model, result, before.sizes, after.sizes)
    changed = {s: v for s, v in new.items() if old[s] != v}
    write_attributes(result, changed)
    _verify(result, graph.traced, proof, varied)
    return Eager(result, _list_attributes(result, changed))


def list_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those a state_dict leaves out as well; tied ones under each name."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named.items()}


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor], attributes: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Return the pruned network from a fresh full-size one, which is not changed (and may be on the meta device).

    `tensors` are those of `list_tensors`, `attributes` those of `Eager`. Raises CheckpointError where names differ.
    """
    result = _copy_module(model)
    wrong = sorted(set(tensors) ^ set(list_tensors(result)))
    if wrong:
        raise CheckpointError(
            f"The saved tensors belong to another network: {len(wrong)} names differ. The first is {wrong[0]!r}. "
            "Give a fresh instance of the very network that was compressed."
        )
    names: dict[int, str] = {}
    for name in sorted(tensors):
        first = names.setdefault(id(get_tensor(result, name)), name)
        if first != name and not torch.equal(tensors[first], tensors[name]):
            raise CheckpointError(
                f"{first!r} and {name!r} are one tensor in the network but two in what was saved. "
                "Their values differ. Give a fresh instance of the very network that was compressed."
            )
    values: dict[Source, int] = {}
    for entry in attributes:
        module, name, value = entry["module"], entry["name"], entry["value"]
        parts = {None: value} if isinstance(value, int) else dict(enumerate(value))
        values |= {Source(module, name, index): part for index, part in parts.items()}
    missing = sorted(str(s) for s in values.keys() - read_attributes(result).keys())
    if missing:
        raise CheckpointError(
            f"The network has no integer attribute {missing[0]!r}. The saved list of attributes names it. "
            "Give a fresh instance of the very network that was compressed."
        )
    _place_tensors(result, tensors)
    write_attributes(result, values)
    return result


def copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Put the tensors of a flat graph into the eager result of the same choice, for instance after recovery.

    Every tensor of `source` must be in `target` with its shape, and every parameter of `target` in `source`; buffers
    that the graph does not use stay. Raises CheckpointError, and changes nothing, where they differ.
    """
    own, given = list_tensors(target), list_tensors(source)
    # Constants made inside forward are tensors of the graph only.
    given = {name: t for name, t in given.items() if name in own or not _is_constant(target, name)}
    wrong = [name for name, t in given.items() if name not in own or own[name].shape != t.shape]
    found = {id(get_tensor(target, name)) for name in given.keys() & own.keys()}
    wrong += [name for name, parameter in target.named_parameters() if id(parameter) not in found]
    if wrong:
        raise CheckpointError(
            f"The graph and the module are of different networks: {len(wrong)} tensors differ in name or shape. "
            f"The first is {wrong[0]!r}. Slice both with the same choice of kept positions."
        )
    with torch.no_grad():
        for name, tensor in given.items():
            get_tensor(target, name).copy_(tensor)


def _is_constant(target: nn.Module, name: str) -> bool:
    if name.rpartition(".")[2].startswith(("lifted_tensor_", "_tensor_constant")):
        return True
    try:
        return not isinstance(get_tensor(target, name), nn.Parameter)
    except AttributeError:
        return False


def _copy_module(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise FixedSize(
            f"The network cannot be copied: {error}. It was tried with copy.deepcopy on {type(model).__name__}. "
            "Take the graph result, which needs no copy of the module."
        ) from error


def _changed_tensors(model: nn.Module, sliced: nn.Module) -> dict[str, Tensor]:
    """List the tensors of the sliced graph that have another shape than the module's own."""
    changed: dict[str, Tensor] = {}
    own = list_tensors(model)
    for name, tensor in list_tensors(sliced).items():
        if name not in own:
            try:
                same = get_tensor(model, name).shape == tensor.shape
            except AttributeError:
                same = True  # a constant written in forward; should its size matter, the comparison will tell
            if not same:
                raise FixedSize(
                    f"Pruning changes the size of {name!r}, which is neither a parameter nor a buffer. "
                    f"It is a plain attribute of {type(model).__name__}. Register it with register_buffer."
                )
        elif own[name].shape != tensor.shape:
            changed[name] = tensor.detach().clone()
    return changed


def _place_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers new values of any shape; the objects stay, so that tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        old = get_tensor(model, name)
        if not old.is_meta:
            old.grad = None
            old.data = tensor.detach().clone()
            continue
        path, _, leaf = name.rpartition(".")
        value = tensor.detach().clone()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(model.get_submodule(path), leaf, made.setdefault(id(old), value))


# Attributes that only describe


def _describe(
    attributes: Mapping[Source, int],
    old: nn.Module,
    new: nn.Module,
    old_sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    new_sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> dict[Source, int]:
    """Update attributes that reach no call where they name a size of their own module's tensors that changed.

    Names that begin with "in_" or "out_" look at what the module takes or returns, all others at its parameters; an
    attribute stays where two sizes of its value became different ones.
    """
    changed: dict[Source, int] = {}
    tensors = list_tensors(new)
    owned: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    for name, tensor in list_tensors(old).items():
        owned.setdefault(name.rpartition(".")[0], []).append((tensor.shape, tensors[name].shape))
    for source, value in attributes.items():
        own = owned.get(source.module, [])
        if all(a == b for a, b in own):
            continue
        pairs = [pair for a, b in own for pair in zip(a, b, strict=True)]
        side = next((i for i, start in enumerate(("in_", "out_")) if source.name.startswith(start)), None)
        if side is not None and source.module in old_sizes and source.module in new_sizes:
            sizes = zip(old_sizes[source.module][side], new_sizes[source.module][side], strict=True)
            pairs = [(a, b) for a, b in sizes if a != b]
        targets = {b for a, b in pairs if a == value}
        if len(targets) == 1:
            changed[source] = targets.pop()
    return changed


def _list_attributes(model: nn.Module, changed: Mapping[Source, int]) -> list[dict[str, Any]]:
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for source in changed:
        value = vars(model.get_submodule(source.module))[source.name]
        plain = value if isinstance(value, int) else list(value)
        entries[source.module, source.name] = {"module": source.module, "name": source.name, "value": plain}
    return list(entries.values())


# The proof


@dataclass(frozen=True)
class _Proof:
    """What the sliced graph gives: its outputs and the shapes of every node's output."""

    outputs: list[Tensor]
    shapes: dict[str, Any]
    is_double: bool


def _vary_constants(model: nn.Module, sliced: nn.Module) -> dict[str, Tensor]:
    """Give parameters that hold one value throughout (zeros, ones) others, lest a zero hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    given = list_tensors(sliced)
    names: dict[int, list[str]] = {}  # a tied parameter has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in given:
            names.setdefault(id(parameter), []).append(name)
    varied: dict[str, Tensor] = {}
    for same in names.values():
        value = given[same[0]]
        if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            varied |= {name: value.double() + 0.1 * noise.to(value.device) for name in same}
    return varied


def _run_sliced(sliced: fx.GraphModule, traced: Traced, varied: Mapping[str, Tensor]) -> _Proof:
    """Run the sliced graph in float64; where a type is written into the graph, in its own."""
    wide = _to_double(copy.deepcopy(sliced))
    assert isinstance(wide, fx.GraphModule)
    _place_tensors(wide, varied)
    try:
        return _run_nodes(wide, _widen(traced.example), True)
    except RuntimeError:
        return _run_nodes(sliced, traced.example, False)


def _run_nodes(module: fx.GraphModule, inputs: Batch, is_double: bool) -> _Proof:
    shapes: dict[str, Any] = {}
    outputs: list[Tensor] = []
    with torch.no_grad():
        for node, value, _ in run_nodes(module, inputs):
            if node.op == "output":
                outputs = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            elif isinstance(value, (tuple, list)):
                shapes[node.name] = [tuple(v.shape) if isinstance(v, Tensor) else () for v in value]
            elif isinstance(value, Tensor):
                shapes[node.name] = tuple(value.shape)
    return _Proof(outputs, shapes, is_double)


def _verify(result: nn.Module, traced: Traced, proof: _Proof, varied: Mapping[str, Tensor]) -> None:
    """Compare the eager result with the graph result on the example inputs."""
    module, inputs = _copy_module(result), traced.example
    if proof.is_double:
        module, inputs = _to_double(module), _widen(inputs)
        _place_tensors(module, varied)
    args, kwargs = pytree.tree_unflatten(list(inputs), traced.in_spec)
    value = run_watched(contextlib.nullcontext(), module, args, kwargs)
    found = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    advice = "A number computed from a size (a scale, a loop count) is the usual reason; or take the graph result."
    if [v.shape for v in found] != [v.shape for v in proof.outputs]:
        raise FixedSize(
            f"The pruned module returns {[tuple(v.shape) for v in found]}, "
            f"its graph {[tuple(v.shape) for v in proof.outputs]}. "
            f"All sizes of {type(result).__name__}'s calls were put right. {advice}"
        )
    pairs = [(a.double(), b.double()) for a, b in zip(found, proof.outputs, strict=True) if a.numel()]
    scale = 1 + max((float(b.abs().max()) for _, b in pairs), default=0.0)
    error = max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / scale
    if not error <= (EAGER_TOLERANCE if proof.is_double else EAGER_TOLERANCE_OWN_TYPE):
        raise FixedSize(
            f"The pruned module's output differs from its graph's by {error:.2g} of the largest. "
            f"All sizes of {type(result).__name__}'s calls were put right. {advice}"
        )


def _widen(batch: Batch) -> Batch:
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def _to_double(module: nn.Module) -> nn.Module:
    """Turn parameters, buffers and plain tensor attributes to float64, in place."""
    module.double()
    for inner in module.modules():
        for name, value in list(vars(inner).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(inner)[name] = value.double()
    return module


__all__ = ["Eager", "copy_tensors", "list_tensors", "rebuild", "slice_module"]
