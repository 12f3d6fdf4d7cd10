"""Submodules as graphs of their own, for what their source cannot express.

A submodule's part of the network's graph is found by value: its inputs and outputs are recorded in a run of the
caller's module and looked up among the values of the graph's nodes. What lies between them is the part.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import FixedSize
from jettison.graph.axes import Keeps, is_touched
from jettison.graph.calls import Call, list_fixed, record_calls
from jettison.graph.comparing import (
    Proof,
    list_tensors,
    measure_error,
    prepare,
    run_sliced,
    tolerance_of,
    vary_constants,
)
from jettison.graph.groups import Graph
from jettison.graph.inline import hold_tensor
from jettison.graph.provenance import Misfit
from jettison.graph.state import plain_attention
from jettison.graph.subgraphs import iterate_nodes, list_regions
from jettison.graph.trace import Batch, find_attribute, nest, run_nodes
from jettison.graph.trainable import install_part


@dataclass(frozen=True)
class Part:
    """A submodule's part of the graph, before and after pruning; `nodes` names what it stands for."""

    whole: fx.GraphModule
    small: fx.GraphModule
    nodes: frozenset[str]


class Cutter:
    """Cuts submodules out of the graph of `model`, one after the other; `parts` and `reasons` go by their paths."""

    def __init__(
        self, model: nn.Module, graph: Graph, keeps: Keeps, sliced: fx.GraphModule, final: fx.GraphModule
    ) -> None:
        self.model, self.graph, self.keeps, self.sliced, self.final = model, graph, keeps, sliced, final
        self.parts: dict[str, Part] = {}
        self.reasons: dict[str, str] = {}
        self.fused: set[str] = set()
        """Submodules, or the larger ones around them, that torch may run as one fused kernel."""

    @cached_property
    def proof(self) -> Proof:
        """What the graph with its final weights gives for the example inputs."""
        return run_sliced(self.model, self.final, self.graph.traced.example)

    def replace(self, misfits: Sequence[Misfit]) -> None:
        """Cut out the submodules to blame, or the next larger ones; raises the Misfit that only the root could cure."""
        wanted = dict(map(self._widen, reversed(misfits)))
        while True:
            if "" in wanted:
                raise wanted[""]
            paths = {p for p in [*wanted, *self.parts] if not any(_is_inside(p, q) for q in [*wanted, *self.parts])}
            calls = self._record({p for p in paths if p not in self.parts})
            same = self._look_up_all(calls)
            failed = {}
            for path, found in calls.items():
                try:
                    self.parts[path] = self._cut(path, found, same)
                    self.reasons[path] = str(wanted[path])
                except FixedSize:
                    failed[path] = wanted.pop(path)
            self.parts = {p: part for p, part in self.parts.items() if p in paths}
            self.reasons = {p: reason for p, reason in self.reasons.items() if p in paths}
            if not failed:
                return
            wanted |= {self._parent(path): misfit for path, misfit in failed.items()}

    def install(self, module: nn.Module, *, is_small: bool) -> None:
        """Put the parts into a copy of the model, whose tensors they take."""
        for path, part in self.parts.items():
            install_part(module, path, part.small if is_small else part.whole)

    def find_difference(self, result: nn.Module) -> str:
        """Return the innermost submodule of the pruned module that computes something else than the graph."""
        whole = replace(self.proof, varied=vary_constants(self.model, self.graph.module))
        try:
            expected = [e for e in self._watch(self.model, whole) if not self._is_replaced(e[0])]
        except RuntimeError:
            return ""
        names = self._look_up([tensor for *_, tensor in expected], whole)
        places = [(path, is_output) for path, is_output, _ in expected]
        del expected  # all that goes between submodules, once; twice would be more memory than some machines have
        try:
            found = self._watch(result, self.proof)
        except RuntimeError:
            return ""
        different = self._compare(names, [tensor for *_, tensor in found])
        for index, ((path, is_output), (other, *_)) in enumerate(zip(places, found, strict=False)):
            if path != other:
                return self._parent(path)
            if index in different:
                return path if is_output else self._parent(path)
        return ""

    def _compare(self, names: Sequence[list[str]], tensors: Sequence[Tensor]) -> set[int]:
        """Return the places of the tensors that are not what the first of their nodes gives in the sliced graph."""
        readers: dict[str, list[int]] = {}
        for index, same in enumerate(names[: len(tensors)]):
            for name in same[:1]:
                readers.setdefault(name, []).append(index)
        module = prepare(self.final, self.proof)
        assert isinstance(module, fx.GraphModule)
        tolerance = tolerance_of(self.proof)
        return {
            index
            for name, value in _iterate_values(module, self.proof.inputs)
            for index in readers.get(name, ())
            if tensors[index].shape != value.shape or not measure_error([tensors[index]], [value]) <= tolerance
        }

    def _widen(self, misfit: Misfit) -> tuple[str, Misfit]:
        """Return the submodule to cut out, and why: where it is a part already, the next larger one for its reason."""
        inside = next((p for p in self.parts if p == misfit.module or _is_inside(misfit.module, p)), None)
        if inside is None:
            return misfit.module, misfit
        return self._parent(inside), Misfit(self.reasons[inside], inside)

    def _parent(self, path: str) -> str:
        """Return the next larger submodule that has a forward of its own."""
        while path:
            path = path.rpartition(".")[0]
            kind = type(self.model.get_submodule(path))
            if kind not in (nn.ModuleList, nn.ModuleDict) and kind.forward is not nn.Module.forward:
                break
        return path

    def _is_replaced(self, path: str) -> bool:
        return any(_is_inside(path, p) for p in self.parts)

    def _record(self, paths: set[str]) -> dict[str, list[Call]]:
        """Run the model and note every call of the submodules; a second run tells what depends on the batch."""
        if not paths:
            return {}
        whole = replace(self.proof, varied=vary_constants(self.model, self.graph.module))
        module, inputs = prepare(self.model, whole), whole.inputs
        calls = record_calls(module, inputs, self.graph.traced.in_spec, paths)
        if self.graph.traced.dynamic_batch:
            doubled = tuple(torch.cat([x, x]) if x.dim() else x for x in inputs)
            others = record_calls(module, doubled, self.graph.traced.in_spec, paths)
            for path in paths:
                if [list_fixed(c) for c in calls[path]] != [list_fixed(c) for c in others[path]]:
                    calls[path] = []  # a number that follows the batch is handed over
        return calls

    def _watch(self, model: nn.Module, proof: Proof) -> list[tuple[str, bool, Tensor]]:
        """Run a module and list what goes into and comes out of every submodule, in order."""
        module = prepare(model, proof)
        events: list[tuple[str, bool, Tensor]] = []
        copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

        def keep(value: Tensor) -> Tensor:
            """Copy a tensor once: it goes out of one submodule, of those around it, and into the next."""
            alive, version, copy = copies.get(id(value), (lambda: None, 0, value))
            if alive() is not value or version != value._version:
                copy = value.clone()
                copies[id(value)] = weakref.ref(value), value._version, copy
            return copy

        def note(path: str, is_output: bool) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
                leaves = pytree.tree_leaves(output if is_output else (args, kwargs))
                events.extend((path, is_output, keep(v)) for v in leaves if isinstance(v, Tensor))

            return hook

        for path, inner in module.named_modules():
            if not self._is_replaced(path):
                inner.register_forward_pre_hook(note(path, False), with_kwargs=True)
                inner.register_forward_hook(note(path, True), with_kwargs=True)
        args, kwargs = pytree.tree_unflatten(list(proof.inputs), self.graph.traced.in_spec)
        with torch.no_grad(), plain_attention():
            module.eval()(*args, **kwargs)
        return events

    def _look_up(self, tensors: Sequence[Tensor], whole: Proof) -> list[list[str]]:
        """Name, for each tensor, the nodes of the original graph that have its value, in order."""
        module = prepare(self.graph.module, whole)
        assert isinstance(module, fx.GraphModule)
        same: list[list[str]] = [[] for _ in tensors]
        by_shape: dict[Any, list[int]] = {}
        for index, tensor in enumerate(tensors):
            by_shape.setdefault((tensor.shape, tensor.dtype), []).append(index)
        firsts = [float(t.flatten()[0]) if t.numel() else 0.0 for t in tensors]
        tolerance = tolerance_of(whole)
        for name, value in _iterate_values(module, whole.inputs):
            indices = by_shape.get((value.shape, value.dtype), ())
            first = float(value.flatten()[0]) if indices and value.numel() else 0.0
            for index in indices:
                near = abs(first - firsts[index]) <= 1e-3 * (1 + abs(first)) or first != first
                if near and measure_error([value], [tensors[index]]) <= tolerance:
                    same[index].append(name)
        return same

    def _look_up_all(self, calls: Mapping[str, list[Call]]) -> dict[int, list[str]]:
        """Name the nodes that have the value of each tensor that goes into or out of the calls, by its identity."""
        leaves = [v for found in calls.values() for c in found for v in (*c.inputs, *c.outputs)]
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        whole = replace(self.proof, varied=vary_constants(self.model, self.graph.module))
        return {id(t): names for t, names in zip(tensors, self._look_up(tensors, whole), strict=True)}

    def _cut(self, path: str, calls: list[Call], same: Mapping[int, list[str]]) -> Part:
        """Cut the nodes of a submodule's calls out of both graphs; raises FixedSize where that cannot be done."""
        if not calls:
            raise FixedSize(f"{path!r} is not called as a module, or with numbers that follow the batch.")
        nodes: set[str] = set()
        cuts: list[tuple[fx.GraphModule, fx.GraphModule]] = []
        for call in calls:
            sources = [same[id(v)] if isinstance(v, Tensor) else [] for v in call.inputs]
            targets = [same[id(v)] if isinstance(v, Tensor) else v for v in call.outputs]
            pair = []
            for main in (self.graph.module, self.sliced):
                flat, used = self._cut_call(path, main, sources, targets)
                pair.append(nest(flat, call.in_spec, call.out_spec))
                nodes |= used
            cuts.append((pair[0], pair[1]))
        first = cuts[0]
        if not all(_is_same(a, b) for cut in cuts[1:] for a, b in zip(first, cut, strict=True)):
            raise FixedSize(f"{path!r} runs several times, and not in the same way.")
        return Part(first[0], first[1], frozenset(nodes))

    def _cut_call(
        self, path: str, main: fx.GraphModule, sources: list[list[str]], targets: list[Any]
    ) -> tuple[fx.GraphModule, set[str]]:
        """Copy the nodes between the inputs and the outputs of one call; returns them with their names."""
        by_name = {n.name: n for n in main.graph.nodes}
        inputs: dict[fx.Node, int] = {}
        for index, names in reversed(list(enumerate(sources))):
            # A layer whose weights are the identity gives the submodule's input again.
            outer = [name for name in names if not _is_made_in(path, by_name[name])]
            inputs |= {by_name[name]: index for name in outer or names}
        outputs = [_choose(path, [by_name[n] for n in t]) if isinstance(t, list) else t for t in targets]
        graph = fx.Graph()
        holders = [graph.placeholder(f"input_{index}") for index in range(len(sources))]
        copies: dict[fx.Node, fx.Node] = {node: holders[index] for node, index in inputs.items()}
        needed, waiting = set(), [n for n in outputs if isinstance(n, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node in copies or node in needed:
                continue
            size = self._find_size(node, inputs)
            if size is not None:
                copies[node] = _copy_size(graph, holders[inputs[size[0]]], size)
            elif node.op == "placeholder":
                raise FixedSize(f"{path!r} reads an input of the network that it is not given.")
            else:
                needed.add(node)
                waiting += node.all_input_nodes
        for node in main.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[n] if isinstance(n, fx.Node) else n for n in outputs])
        root = nn.Module()
        self._localise(graph, path, main, root)
        regions = [region for node in needed for region in list_regions(main, node)]
        return fx.GraphModule(root, graph), {
            *(n.name for n in needed),
            *(n.name for region in regions for n in iterate_nodes(region.module)),
        }

    def _find_size(self, node: fx.Node, inputs: Mapping[fx.Node, int]) -> tuple[fx.Node, int, int] | None:
        """Find a number that follows the batch among the sizes of the inputs: (input, dimension, divisor)."""
        wanted = node.meta.get("val")
        if not isinstance(wanted, torch.SymInt):
            return None
        terms = {n.name: dims for n, dims in self.graph.axes.terms.items()}
        for source in inputs:
            value = source.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                dims = terms.get(source.name, ())
                if isinstance(size, torch.SymInt) and not (dims and is_touched(dims[dim], self.keeps)):
                    ratio = size.node.expr / wanted.node.expr
                    if ratio.is_Integer and ratio > 0:
                        return source, dim, int(ratio)
        return None

    def _localise(self, graph: fx.Graph, path: str, main: fx.GraphModule, root: nn.Module) -> None:
        """Give tensors the names they have inside the submodule; what is no tensor of it becomes a constant."""
        owned: dict[int, str] = {}
        inside = self.model.get_submodule(path)
        for name in list_tensors(inside):
            owned[id(find_attribute(inside, name))] = name
        mine = {f"{path}.{name}": name for name in list_tensors(inside)}
        outside = list_tensors(self.model)
        for number, node in enumerate(n for n in graph.nodes if n.op == "get_attr"):
            target = str(node.target)
            value = find_attribute(main, target)
            if target in outside and outside[target].shape != find_attribute(self.graph.module, target).shape:
                target = ""  # the forward writes it anew: a constant of the graph's
            if target in mine:
                node.target = mine[target]
            elif target in outside:
                alias = owned.get(id(find_attribute(self.model, target)))
                if alias is None:
                    raise FixedSize(f"{path!r} reads {target!r}, which is not its own.")
                node.target = alias
            else:
                node.target = f"constant_{number}"
                if isinstance(value, Tensor):
                    root.register_buffer(node.target, value.detach(), persistent=False)
                else:
                    root.add_module(node.target, value)
        for node in graph.nodes:
            if node.op == "get_attr" and not node.target.startswith("constant_"):
                hold_tensor(root, node.target, find_attribute(inside, node.target))


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _iterate_values(module: fx.GraphModule, inputs: Batch) -> Iterator[tuple[str, Tensor]]:
    """Run a graph and yield the name and value of every node that yields one tensor."""
    feed = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            yield node.name, next(feed)
        elif node.op == "get_attr":
            value = find_attribute(module, str(node.target))
            if isinstance(value, Tensor):
                yield node.name, value.detach()
    with torch.no_grad():
        for node, value, _ in run_nodes(module, inputs):
            if node.graph is module.graph and node.op != "output" and isinstance(value, Tensor):
                yield node.name, value


def _choose(path: str, nodes: list[fx.Node]) -> fx.Node:
    """Return which of the nodes of one value a submodule returned: its own first."""
    if not nodes:
        raise FixedSize(f"An output of {path!r} is not in the graph.")
    return next((node for node in nodes if _is_made_in(path, node)), nodes[0])


def _is_made_in(path: str, node: fx.Node) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(str(name).split("@")[0] == path for name, _ in stack.values())


def _copy_size(graph: fx.Graph, holder: fx.Node, size: tuple[fx.Node, int, int]) -> fx.Node:
    _, dim, divisor = size
    node = graph.call_function(torch.ops.aten.sym_size.int, (holder, dim))
    return node if divisor == 1 else graph.call_function(operator.floordiv, (node, divisor))


def _spell(node: fx.Node, order: Mapping[fx.Node, int]) -> str:
    return repr(fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}"))


def _is_same(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Tell whether two graphs compute the same from the same tensors."""
    left, right = list(a.graph.nodes), list(b.graph.nodes)
    order = [{node: index for index, node in enumerate(nodes)} for nodes in (left, right)]
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if (
            x.op != y.op
            or _spell(x, order[0]) != _spell(y, order[1])
            or (x.op != "placeholder" and x.target != y.target)
        ):
            return False
        if x.op == "get_attr":
            one, two = find_attribute(a, str(x.target)), find_attribute(b, str(y.target))
            if isinstance(one, Tensor) and not torch.equal(one, two):
                return False
    return True
