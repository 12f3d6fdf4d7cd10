"""Oracles beside masked = sliced: each returns a `Check` with the value it found and the tolerance it was held to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from jettison.core.errors import InputError
from jettison.core.record import Check
from jettison.graph.analyse import Member
from jettison.graph.axes import Atom, Cat, Keeps, Term, count_kept, resolve
from jettison.graph.check import measure_difference, run_double
from jettison.graph.groups import Graph, Group
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.store import load_graph, save_graph
from jettison.graph.subgraphs import iterate_nodes, list_tensors_used
from jettison.graph.trace import Batch, find_attribute, run_nodes, set_tensor
from jettison.quantization.convert import Quantized
from jettison.quantization.storing import load_quantized

PERMUTATION_TOLERANCE = 1e-12
"""Relative, in float64: the same sums in another order."""

Kept = Mapping[str, Sequence[int]]
"""Kept positions per group name."""


def draw_kept(graph: Graph, *, seed: int, share: float = 0.6, least: int = 1) -> dict[str, list[int]]:
    """Return random kept positions for every group: each stays with probability `share`, at least `least` stay."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        count = int((torch.rand(group.size, generator=generator) < share).sum())
        # Something must go, or the choice tests nothing.
        count = max(min(count, group.size - 1), min(least, group.size))
        kept[group.name] = sorted(int(i) for i in order[:count])
    return kept


def check_permutation(
    graph: Graph, group: Group, inputs: Batch, *, seed: int = 0, without: Member | None = None
) -> Check:
    """Permute a group's positions in all its members: the network must compute the same, or a member is missing.

    With `without`, that member is left as it is, and the check should fail: this shows that it would notice
    a missing one. (A bias that a softmax cancels is the exception.) The value is the largest difference
    relative to 1 + the largest output, in float64.
    """
    order = _derange(group.size, seed)
    permuted = slice_graph(graph, {})
    for member in group.members:
        if member != without:
            _permute_member(permuted, member, graph.axes.tensors[member.tensor][member.dim], group.atom, order)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected, found = run_double(graph.module, wide), run_double(permuted, wide)
    scale = 1 + max(float(y.double().abs().max()) for y in expected)
    error = measure_difference(found, expected) / scale
    detail = f"group {group.name!r}, {len(group.members)} members" + (f" without {without}" if without else "")
    return Check("permutation", error <= PERMUTATION_TOLERANCE, error, PERMUTATION_TOLERANCE, detail)


def _derange(size: int, seed: int) -> Tensor:
    """Return a permutation that leaves no position in its place."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    shifted = torch.empty_like(order)
    shifted[order] = order.roll(1)
    return shifted


def _permute_member(module: fx.GraphModule, member: Member, term: Term, atom: Atom, order: Tensor) -> None:
    tensor = find_attribute(module, member.tensor)
    moved = tensor.detach().index_select(member.dim, permute_positions(term, atom, order))
    for name in list_tensors_used(module):
        if find_attribute(module, name) is tensor:
            set_tensor(module, name, moved)


def permute_positions(term: Term, atom: Atom, order: Tensor) -> Tensor:
    """Return where each position of `term` comes from when the positions of `atom` are put in `order`."""
    term = resolve(term)
    if isinstance(term, Atom):
        return order if term is atom else torch.arange(term.size)
    index = torch.zeros(1 if not isinstance(term, Cat) else 0, dtype=torch.long)
    if isinstance(term, Cat):
        for part in term.parts:
            index = torch.cat([index, permute_positions(part, atom, order) + len(index)])
        return index
    for factor in term.factors:
        index = (index[:, None] * factor.size + permute_positions(factor, atom, order)[None, :]).flatten()
    return index


def check_composition(graph: Graph, first: Kept, second: Kept, inputs: Batch) -> Check:
    """Prune `first`, then `second`: the same groups, tensors and outputs as pruning both at once.

    Both name original positions, and together must keep at least two of every group (an axis of one position
    is no group any more).
    """
    both = {name: sorted(set(first.get(name, second.get(name, ()))) & set(second.get(name, first.get(name, ()))))
            for name in {*first, *second}}  # fmt: skip
    if any(len(kept) < 2 for kept in both.values()):
        raise InputError("The two choices together keep fewer than two positions of a group. Keep more.")
    halfway = prune_graph(graph, first)
    renamed = {g.name: h.name for g, h in zip(graph.groups, halfway.groups, strict=True)}
    step = {
        renamed[name]: [sorted(first[name]).index(i) for i in both[name]] if name in first else both[name]
        for name in second
    }
    stepwise, at_once = prune_graph(halfway, step), prune_graph(graph, both)
    same = [(g.size, g.members) for g in stepwise.groups] == [(g.size, g.members) for g in at_once.groups]
    with torch.no_grad():
        error = measure_difference(tuple(stepwise.module(*inputs)), tuple(at_once.module(*inputs)))
    names = dict(at_once.module.state_dict())
    mine = tuple(stepwise.module.state_dict()[name] for name in names)
    error = max(error, measure_difference(mine, tuple(names.values())))
    survive = [len(both[g.name]) if g.name in both else g.size for g in graph.groups]
    same = same and [g.size for g in at_once.groups] == survive
    detail = f"{len(at_once.groups)} groups" + ("" if same else ", not the same ones")
    return Check("composition", same and error == 0.0, error, 0.0, detail)


def check_prediction(graph: Graph, keeps: Keeps, inputs: Batch) -> Check:
    """Compare the sizes that terms predict for every tensor with those the sliced network has; counts differences."""
    pruned = slice_graph(graph, keeps)
    actual: dict[str, object] = {}
    with torch.no_grad():
        for node, value, _ in run_nodes(pruned, inputs):
            actual[node.name] = value
    wrong, seen = 0, 0
    for node in iterate_nodes(graph.module):
        value = actual.get(node.name)
        if isinstance(value, Tensor):
            original = node.meta["val"]
            for dim, term in enumerate(graph.axes.terms[node]):
                if isinstance(original.shape[dim], int):
                    seen += 1
                    wrong += value.shape[dim] != count_kept(term, keeps)
    return Check("predicted sizes", wrong == 0 and seen > 0, float(wrong), 0.0, f"{seen} dimensions")


def check_round_trip(graph: Graph, inputs: Batch, folder: Path | None = None) -> Check:
    """Save a graph, load it, and compare outputs bit by bit; the value is the number of outputs that differ."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        save_graph(graph.module, graph.traced.in_spec, graph.traced.out_spec, place)
        loaded, in_spec, out_spec = load_graph(place)
    with torch.no_grad():
        expected, found = graph.module(*inputs), loaded(*inputs)
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor)]
    wrong = sum(not torch.equal(a, b) or a.dtype != b.dtype for a, b in pairs)
    same = in_spec == graph.traced.in_spec and out_spec == graph.traced.out_spec
    detail = f"{len(pairs)} outputs" + ("" if same else ", nested otherwise")
    return Check("round trip", wrong == 0 and same, float(wrong), 0.0, detail)


def check_quantized_round_trip(
    quantized: Quantized, inputs: Batch | Mapping[str, Tensor], folder: Path | None = None
) -> Check:
    """Save a quantized network, load it, and compare outputs and tensors bit by bit; the value is how many differ.

    `inputs` are positional or keyword inputs. Names, bits and note of the layers must be the same as well.
    """
    with tempfile.TemporaryDirectory() as temporary:
        loaded = load_quantized(quantized.save(folder or Path(temporary)))
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    arguments = () if isinstance(inputs, Mapping) else inputs
    with torch.no_grad():
        expected, found = (m(*arguments, **keywords) for m in (quantized.module, loaded.module))
    (mine, spec), (theirs, other) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    wrong = sum(not has_same_bits(a, b) for a, b in zip(mine, theirs, strict=False))
    # An integer or two may be lost in the rounding of these very inputs.
    held, again = quantized.module.state_dict(), loaded.module.state_dict()
    wrong += sum(name not in again or not has_same_bits(held[name], again[name]) for name in held)
    same = spec == other and (loaded.sites, loaded.note) == (quantized.sites, quantized.note)
    detail = f"{len(mine)} outputs" + ("" if same else ", nested or described otherwise")
    return Check("quantized round trip", wrong == 0 and same and bool(mine), float(wrong), 0.0, detail)


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are of one type and shape and hold the same bits; 0 and -0 do not."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))


__all__ = [
    "check_composition",
    "check_permutation",
    "check_prediction",
    "check_quantized_round_trip",
    "check_round_trip",
    "draw_kept",
    "has_same_bits",
    "permute_positions",
]
