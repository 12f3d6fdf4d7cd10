"""The eager result: the caller's own module class with sliced tensors and integer attributes put right.

The graph result is always possible; this one where the user's source can express it. Attributes are found, not listed:
the forward runs twice with tagged integers (`provenance`), once as it was and once with sliced tensors, and every call
that takes sizes is matched to its node in the graph, which says what those sizes must become. Only sizes are asked for
in these runs; the comparison with the graph at the end is what computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import CheckpointError, FixedSize
from jettison.graph.axes import Keeps
from jettison.graph.caches import forget_caches
from jettison.graph.comparing import copy_module, copy_shadow, list_tensors, place_tensors, verify
from jettison.graph.groups import Graph
from jettison.graph.hybrid import Cutter
from jettison.graph.matching import CallNodes, TaggedRun
from jettison.graph.provenance import (
    Demand,
    Misfit,
    Source,
    read_attributes,
    solve_demands,
    write_attributes,
)
from jettison.graph.rewrite import refresh, slice_graph
from jettison.graph.small import is_equal, run_small
from jettison.graph.trace import find_attribute, get_tensor
from jettison.graph.trainable import install_part


@dataclass(frozen=True)
class Eager:
    """The caller's own module, pruned, and what was changed in it beside its tensors.

    `attributes` is plain JSON: a list of `{"module", "name", "value"}`; `rebuild` takes it. `replaced` names the
    submodules that are graphs, because their source fixes a size, each with the reason; none where all is the caller's.
    """

    module: nn.Module
    attributes: list[dict[str, Any]]
    replaced: dict[str, str]


def slice_module(model: nn.Module, graph: Graph, keeps: Keeps, final: fx.GraphModule | None = None) -> Eager:
    """Return a copy of `model` without the dropped positions: same class, same names; the model is not changed.

    `graph` must be traced from `model`. A submodule whose source cannot express the pruned network is replaced by its
    part of the graph, the smallest that will do. The copy's output is compared with that of `slice_graph` on the
    example inputs, or on small pictures where those tell as much, in float64 wherever the graph runs in it. With
    `final`, that graph with other weights (refitted ones), the copy gets those and is compared with it. Raises
    FixedSize, with the user's line, where only the whole network could be replaced, and CheckpointError where `final`
    is the graph of another choice.
    """
    cutter = _make_cutter(model, graph, keeps, final)
    while True:
        found = _slice_around(cutter)
        if isinstance(found, Eager):
            return found
        cutter.replace(found)


def find_misfits(model: nn.Module, graph: Graph, keeps: Keeps) -> list[Misfit]:
    """Say which submodules of `model` cannot express the pruned network in their own source; none where all can."""
    found = _slice_around(_make_cutter(model, graph, keeps, None))
    return [] if isinstance(found, Eager) else found


def _make_cutter(model: nn.Module, graph: Graph, keeps: Keeps, final: fx.GraphModule | None) -> Cutter:
    """Slice the graph, and copy `model`, tensors shared, without what its forward computes anew."""
    sliced = slice_graph(graph, keeps)
    refresh(sliced, graph, keeps)
    args, kwargs = pytree.tree_unflatten(list(graph.traced.example), graph.traced.in_spec)
    with forget_caches(model, args, kwargs):
        copied = copy_module(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    return Cutter(copied, graph, keeps, sliced, sliced if final is None else final)


def _slice_around(cutter: Cutter) -> Eager | list[Misfit]:
    """Slice the copy with what `cutter` has cut out so far; or say which submodules cannot be expressed."""
    model, traced, sliced = cutter.model, cutter.graph.traced, cutter.sliced
    misfits = _find_own_tensors(model, traced.module, sliced, cutter.parts)
    if misfits:
        return misfits
    result = _copy_sliced(model, traced.module, sliced)
    cutter.install(result, is_small=True)
    before, after = _run_tagged(cutter, result, is_shadow=True)
    if after.stopped is not None:
        before, after = _run_tagged(cutter, result, is_shadow=False)
    cutter.fused |= before.opened
    misfits = list(after.journal.misfits.values())
    if after.stopped is not None:
        return [*misfits, after.stopped]
    old = read_attributes(result)
    new, unsolved = _solve(after.journal.demands, old)
    misfits = [*unsolved, *misfits]
    if misfits:
        return misfits
    reached = before.journal.reached | after.journal.reached | new.keys()
    described = {s: v for s, v in old.items() if s not in reached and not s.name.startswith("_")}
    new |= _describe(described, model, result, before.sizes, after.sizes)
    changed = {s: v for s, v in new.items() if old[s] != v}
    write_attributes(result, changed)
    if cutter.final is not sliced:
        copy_tensors(cutter.final, result)
    misfits = _compare(cutter, result, after)
    return misfits or Eager(result, _list_attributes(result, changed), dict(cutter.reasons))


def _copy_sliced(model: nn.Module, whole: nn.Module, sliced: nn.Module) -> nn.Module:
    """Copy a module with the tensors of the sliced graph in the place of those that have another shape there."""
    changed = _changed_tensors(model, whole, sliced)
    instead: dict[int, Tensor] = {}
    for name, tensor in changed.items():
        old = get_tensor(model, name)
        if type(old) is nn.Parameter:
            instead.setdefault(id(old), nn.Parameter(tensor, requires_grad=old.requires_grad))
    result = copy_module(model, instead)
    place_tensors(result, {name: t for name, t in changed.items() if get_tensor(result, name).shape != t.shape})
    return result


def _run_tagged(cutter: Cutter, result: nn.Module, *, is_shadow: bool) -> tuple[TaggedRun, TaggedRun]:
    """Run copies of the network before and after pruning with tagged integers; the second says what stopped either.

    A shadow may be stopped by what only a real run can do (read a number, mix devices); it is no verdict.
    """
    graph, parts = cutter.graph, cutter.parts
    calls = CallNodes(graph.traced.module, cutter.sliced, {name for part in parts.values() for name in part.nodes})
    make = copy_shadow if is_shadow else copy_module
    whole = make(cutter.model)
    cutter.install(whole, is_small=False)
    before = TaggedRun(whole, calls, graph.traced, is_shadow=is_shadow)
    after = TaggedRun(make(result), calls, graph.traced, is_shadow=is_shadow)
    try:
        before.run(None)
        after.run(before)
    except Misfit as error:
        after.stopped = error
    return before, after


def _compare(cutter: Cutter, result: nn.Module, after: TaggedRun) -> list[Misfit]:
    """Compare the result with the graph; returns the submodules that compute something else."""
    traced = cutter.graph.traced
    small = None if cutter.fused else run_small(cutter.model, cutter.final, traced.example)
    if small is not None and is_equal(result, traced, small, after.path):
        return []
    try:
        verify(result, traced, cutter.proof)
    except Misfit as error:
        return [error]
    except FixedSize as error:
        return [Misfit(str(error), cutter.find_difference(result))]
    if cutter.fused and torch.backends.mha.get_fastpath_enabled():
        try:
            verify(result, traced, cutter.proof, fused=True)
        except Misfit as error:
            return [error]
        except FixedSize as error:
            return [Misfit(str(error), path) for path in sorted(cutter.fused)]
    return []


def _solve(demands: Sequence[Demand], old: Mapping[Source, int]) -> tuple[dict[Source, int], list[Misfit]]:
    """Solve what the calls demand of the attributes; a submodule whose demands cannot be met is left out and named."""
    misfits: list[Misfit] = []
    while True:
        try:
            return solve_demands(demands, old), misfits
        except Misfit as error:
            misfits.append(error)
            demands = [d for d in demands if d.module != error.module]


def rebuild(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    attributes: Sequence[Mapping[str, Any]],
    parts: Mapping[str, fx.GraphModule] | None = None,
) -> nn.Module:
    """Return the pruned network from a fresh full-size one, which is not changed (and may be on the meta device).

    `tensors` are those of `list_tensors`, `attributes` those of `Eager`, `parts` the submodules it replaced, by their
    paths. Raises CheckpointError where names differ.
    """
    result = copy_module(model)
    parts = parts or {}
    own = {n: t for n, t in tensors.items() if not any(n.startswith(f"{p}.constant_") for p in parts)}
    wrong = sorted(set(own) ^ set(list_tensors(result)))
    if wrong:
        raise CheckpointError(
            f"The saved tensors belong to another network: {len(wrong)} names differ. The first is {wrong[0]!r}. "
            "Give a fresh instance of the very network that was compressed."
        )
    names: dict[int, str] = {}
    for name in sorted(own):
        first = names.setdefault(id(get_tensor(result, name)), name)
        if first != name and not torch.equal(tensors[first], tensors[name]):
            raise CheckpointError(
                f"{first!r} and {name!r} are one tensor in the network but two in what was saved. "
                "Their values differ. Give a fresh instance of the very network that was compressed."
            )
    values: dict[Source, int] = {}
    first_paths = {id(m): path for path, m in result.named_modules()}
    # A module that is used in two places may have been named by the other: its first place held a part.
    paths = {path: first_paths[id(m)] for path, m in result.named_modules(remove_duplicate=False)}
    for entry in attributes:
        module, name, value = entry["module"], entry["name"], entry["value"]
        module = paths.get(module, module)
        pieces = {None: value} if isinstance(value, int) else dict(enumerate(value))
        values |= {Source(module, name, index): piece for index, piece in pieces.items()}
    known = {str(p) for p, _ in result.named_modules()}
    missing = sorted(str(s) for s in values.keys() - read_attributes(result).keys())
    missing += sorted(path for path in parts if path not in known or not path)
    if missing:
        raise CheckpointError(
            f"The network has no integer attribute or submodule {missing[0]!r}. The saved list names it. "
            "Give a fresh instance of the very network that was compressed."
        )
    place_tensors(result, own)
    write_attributes(result, values)
    for path, part in parts.items():
        install_part(result, path, part)
    return result


def copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Put the tensors of a flat graph into the eager result of the same choice, for instance after recovery.

    Every tensor of `source` must be in `target` with its shape, and every parameter of `target` in `source`; buffers
    that the graph does not use stay. Raises CheckpointError, and changes nothing, where they differ.
    """
    own, given = list_tensors(target), list_tensors(source)
    # Constants made inside forward are tensors of the graph only.
    given = {name: t for name, t in given.items() if name in own or not _is_constant(target, name)}
    # A buffer that forward writes anew has the shape it had when the graph was made.
    given = {n: t for n, t in given.items() if n not in own or own[n].shape == t.shape or _is_parameter(target, n)}
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


def _is_parameter(target: nn.Module, name: str) -> bool:
    return isinstance(get_tensor(target, name), nn.Parameter)


def _is_constant(target: nn.Module, name: str) -> bool:
    if name.rpartition(".")[2].startswith(("lifted_tensor_", "_tensor_constant")):
        return True
    try:
        return not isinstance(get_tensor(target, name), nn.Parameter)
    except AttributeError:
        return False


def _changed_tensors(model: nn.Module, whole: nn.Module, sliced: nn.Module) -> dict[str, Tensor]:
    """List the tensors that have another shape in the sliced graph than in the whole one.

    A constant written in forward is left out; should its size matter, the comparison will tell.
    """
    own, before = list_tensors(model), list_tensors(whole)
    return {
        name: tensor.detach().clone()
        for name, tensor in list_tensors(sliced).items()
        if name in own and own[name].shape == before[name].shape != tensor.shape
    }


def _find_own_tensors(model: nn.Module, whole: nn.Module, sliced: nn.Module, parts: Collection[str]) -> list[Misfit]:
    """Name the submodules with a tensor that pruning changes and that they make themselves: it cannot be placed."""
    own, before = list_tensors(model), list_tensors(whole)
    found = []
    for name, tensor in list_tensors(sliced).items():
        if before[name].shape == tensor.shape or any(name.startswith(f"{path}.") for path in parts):
            continue
        path = name.rpartition(".")[0]
        if name not in own and _is_attribute(model, name):
            text = (
                f"Pruning changes the size of {name!r}, which is neither a parameter nor a buffer. "
                f"It is a plain attribute of {type(model.get_submodule(path)).__name__}. "
                "Register it with register_buffer; or take the graph result."
            )
            found.append(Misfit(text, path))
        elif name in own and own[name].shape != before[name].shape:
            text = (
                f"Pruning needs the buffer {name!r} in the shape {tuple(tensor.shape)}. The forward of "
                f"{type(model.get_submodule(path)).__name__} writes it anew as {tuple(before[name].shape)}. "
                "Compute it from sizes that follow the weights; or take the graph result."
            )
            found.append(Misfit(text, path))
    return found


def _is_attribute(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(find_attribute(model, name), Tensor)
    except AttributeError:
        return False


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


__all__ = ["Eager", "copy_tensors", "list_tensors", "rebuild", "slice_module"]
