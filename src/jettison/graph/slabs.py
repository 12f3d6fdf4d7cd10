"""Positions inside slabs: an inner factor of a product may lose other positions in each slab, the same number in all.

In a term `Prod(heads, head_dim)` each head is a slab. Where every tensor that holds the inner axis holds the outer one
beside it, and every operator works on each slab by itself, putting the positions of each slab in an order of its own
leaves the network's function as it is. So the best of each slab are moved to the front, in all members at once, and
then an ordinary choice keeps the front. An axis that also stands alone (the weight of a norm over head_dim, a rotary
table) has one order for all slabs, and is refused.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from jettison.core.errors import InputError, VerificationError
from jettison.graph.analyse import Axes, Dims, iterate_dims, list_terms
from jettison.graph.axes import ONE, Atom, Cat, Prod, Term, iterate_atoms, resolve
from jettison.graph.check import measure_difference, run_double
from jettison.graph.groups import Graph, Group, build_graph
from jettison.graph.layers import find_owners
from jettison.graph.rewrite import slice_graph
from jettison.graph.subgraphs import iterate_nodes
from jettison.graph.trace import find_attribute, set_tensor

BALANCE_TOLERANCE = 1e-9
"""Relative, in float64: the same sums in another order, through a whole network."""


@dataclass(frozen=True)
class Slabs:
    """The axes whose positions, taken together, number the slabs of `group`; none where `refusal` says why."""

    group: Group
    atoms: tuple[Atom, ...]
    refusal: str = ""

    @property
    def count(self) -> int:
        """How many slabs there are."""
        return math.prod(a.size for a in self.atoms)


def find_slabs(graph: Graph, group: Group) -> Slabs:
    """Return the slabs inside which the positions of `group` may be chosen separately, or the reason why none."""
    found: set[Atom] | None = None
    for name, dims in graph.axes.tensors.items():
        beside = _companions(dims, group.atom)
        if beside is None:
            continue
        if name.rpartition(".")[2].startswith(("lifted_tensor_", "_tensor_constant")):
            return Slabs(group, (), f"{name} is a constant written into the source")
        found = beside if found is None else found & beside
        if not found:
            return Slabs(group, (), f"{name} holds it alone, in one order for all")
    touching = _find_touching(graph, group.atom)
    for node in touching:
        for dims in iterate_dims(graph.axes.terms[node]):
            beside = _companions(dims, group.atom)
            found = found if beside is None or found is None else found & beside
        is_own = node.graph is graph.module.graph  # tensors of sub-graphs stay as they are
        found = {s for s in found or () if is_own and _is_slabwise(graph.axes, node, group.atom, s)}
        if not found:
            return Slabs(group, (), f"{node.target} at {node.name} does not work on each slab by itself")
    order = {atom: i for i, atom in enumerate(_atoms_in_order(graph, group))}
    return Slabs(group, tuple(sorted(found or (), key=lambda a: order[a])))


def _find_touching(graph: Graph, atom: Atom) -> list[fx.Node]:
    """Return the calls that read or make a tensor with that axis, those of sub-graphs too."""

    def has(node: fx.Node) -> bool:
        return any(atom in iterate_atoms(t) for t in list_terms(graph.axes.terms.get(node)))

    bearing = {node for node in iterate_nodes(graph.module) if has(node)}
    return [
        node
        for node in iterate_nodes(graph.module)
        if node.op == "call_function" and (node in bearing or not bearing.isdisjoint(node.all_input_nodes))
    ]


def _atoms_in_order(graph: Graph, group: Group) -> list[Atom]:
    return list(dict.fromkeys(a for m in group.members for t in graph.axes.tensors[m.tensor] for a in iterate_atoms(t)))


def _companions(dims: Dims, atom: Atom) -> set[Atom] | None:
    """Return the axes that stand exactly once beside every occurrence of `atom`; None where it does not occur."""
    common: set[Atom] | None = None
    for index, term in enumerate(dims):
        for path in _paths(term, atom):
            beside = path + [a for other, far in enumerate(dims) if other != index for a in _beside(far)]
            once = {a for a in beside if beside.count(a) == 1 and a is not atom}
            common = once if common is None else common & once
    return common


def _beside(term: Term) -> list[Atom]:
    """Return the axes that number all positions of a dimension; those of a part only, twice, and so never once."""
    term = resolve(term)
    direct = term.factors if isinstance(term, Prod) else (term,)
    return [a for f in direct for a in ([f] if isinstance(f, Atom) else [*iterate_atoms(f)] * 2)]


def _paths(term: Term, atom: Atom) -> Iterator[list[Atom]]:
    """Yield, for each occurrence of `atom` in a term, the axes it is multiplied with on the way down."""
    term = resolve(term)
    if term is atom:
        yield []
    elif isinstance(term, Cat):
        for part in term.parts:
            yield from _paths(part, atom)
    elif isinstance(term, Prod):
        for index, factor in enumerate(term.factors):
            others = [a for i, f in enumerate(term.factors) if i != index for a in _beside(f)]
            for path in _paths(factor, atom):
                yield path + others


# Which operators work on each slab by itself


aten = torch.ops.aten


def _packets(names: str) -> set[Any]:
    return {getattr(aten, name) for name in names.split() if hasattr(aten, name)}


_SINGLY = _packets(
    "hardswish log_sigmoid masked_fill where rsub floor_divide prelu batch_norm dropout feature_dropout alpha_dropout "
    "clone contiguous detach alias to _to_copy lift_fresh_copy hardtanh relu6 type_as zeros_like ones_like "
    "cat concat stack split split_with_sizes tensor_split chunk unbind slice narrow select "
    "view reshape flatten unflatten _unsafe_view permute transpose swapaxes t unsqueeze "
    "squeeze expand expand_as view_as reshape_as repeat tile repeat_interleave "
    "constant_pad_nd pad pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle glu"
)
"""Operators that compute each position by itself, or only move positions as their terms say."""
_CONVOLUTIONS = _packets("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
_PRODUCTS = _packets("linear matmul bmm mm addmm einsum scaled_dot_product_attention") | _CONVOLUTIONS
_SPACE = _packets(
    "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest1d "
    "upsample_linear1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest3d "
    "upsample_trilinear3d instance_norm"
)


def _is_slabwise(axes: Axes, node: fx.Node, atom: Atom, slab: Atom) -> bool:
    """Tell whether a node works on each position of `slab` by itself, as far as `atom` is concerned."""
    mixed = _list_mixed(axes, node, slab)
    counted = set(iterate_atoms(axes.group_axes.get(node, ONE)))
    if mixed is None or (atom in counted and slab not in counted):
        return False  # groups move as wholes
    contracted = False
    for operand, inner in mixed:
        dims: Dims = axes.terms[operand]
        mine = [i for i, t in enumerate(dims) if atom in iterate_atoms(t)]
        where = [i for i, t in enumerate(dims) if slab in iterate_atoms(t)]
        if mine and any(i in inner and j != i for i in where for j in mine):
            return False
        contracted = contracted or any(j in inner for j in mine)
    out = iterate_dims(axes.terms[node])
    held = [a for dims in out for t in dims for a in iterate_atoms(t)]
    is_product = getattr(node.target, "overloadpacket", None) in _PRODUCTS
    # Two operands that hold the slab in dimensions of their own would meet in every pair of slabs.
    return not (contracted and is_product) or atom in held or held.count(slab) <= 1


def _list_mixed(axes: Axes, node: fx.Node, slab: Atom) -> list[tuple[fx.Node, set[int]]] | None:
    """Return the dimensions of each operand that a node does not work on position by position; None: not known."""
    packet = getattr(node.target, "overloadpacket", node.target)
    operands = [n for n in node.all_input_nodes if iterate_dims(axes.terms.get(n, ())) != [()]]
    single = [n for n in operands if not isinstance(axes.terms[n][0], tuple)]

    def rank(operand: fx.Node) -> int:
        return len(axes.terms[operand])

    def from_the_left(first: int) -> list[tuple[fx.Node, set[int]]]:
        return [(n, set(range(first, rank(n))) if n is node.args[0] else set()) for n in single]

    if packet in _SINGLY or torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet is operator.getitem:
        return []
    if packet in _CONVOLUTIONS:
        rows = {0} if slab in _beside(axes.group_axes.get(node, ONE)) else set()
        weight = node.args[1]
        return [
            (n, set(range(rank(n))) - rows if n is weight else set(range(1, rank(n)))) for n in single if rank(n) > 1
        ]
    if packet is aten.linear:
        return [(n, {rank(n) - 1} if n is node.args[0] else set(range(rank(n)))) for n in single]
    if packet is aten.einsum:
        return _list_letters(node)
    if packet in _PRODUCTS:
        return [(n, {rank(n) - 1, rank(n) - 2}) for n in single]
    if packet in (aten.layer_norm, aten.rms_norm):
        count = len(node.args[1])  # type: ignore[arg-type]
        return [(n, set(range(rank(n) - count, rank(n)))) for n in single]
    if packet is aten.group_norm:
        return from_the_left(1)
    if packet in _SPACE:
        return from_the_left(2)
    if packet in (aten.softmax, aten.log_softmax, aten.mean, aten.sum, aten.amax, aten.amin):
        return [(n, _named_dims(node, rank(n))) for n in single]
    return None


def _named_dims(node: fx.Node, rank: int) -> set[int]:
    named = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [named] if isinstance(named, int) and not isinstance(named, bool) else named
    chosen = list(dims) if isinstance(dims, (list, tuple)) and dims else range(rank)
    return {d + rank if d < 0 else d for d in chosen if isinstance(d, int)}


def _list_letters(node: fx.Node) -> list[tuple[fx.Node, set[int]]] | None:
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    names = left.split(",")
    free = set(right).intersection(*names)
    if not arrow or "." in left:
        return None
    operands: Any = node.args[1]
    return [
        (n, {i for i, c in enumerate(letters) if c not in free}) for n, letters in zip(operands, names, strict=True)
    ]


# Putting each slab in an order of its own


def permute_slabs(graph: Graph, orders: Mapping[str, Tensor]) -> Graph:
    """Return the same network with the positions of each slab in the order given, in every tensor that holds them.

    `orders` has for each group a permutation in each row, one row for each slab of `find_slabs`; position `r` of slab
    `s` becomes what was `orders[name][s, r]`. Weights are copies where they change. Raises InputError for a group
    whose slabs have one order, and for two groups of which one numbers the slabs of the other.
    """
    chosen = {name: find_slabs(graph, graph.find(name)) for name in orders}
    _check_orders(chosen, orders)
    module = slice_graph(graph, {})
    moved: dict[int, Tensor] = {}
    for name, dims in graph.axes.tensors.items():
        tensor = find_attribute(graph.module, name)
        if id(tensor) not in moved:
            value = tensor
            for group, slabs in chosen.items():
                value = _permute(value, dims, slabs, orders[group])
            moved[id(tensor)] = value
        if moved[id(tensor)] is not tensor:
            set_tensor(module, name, moved[id(tensor)])
    return build_graph(dataclasses.replace(graph.traced, module=module))


def _check_orders(chosen: Mapping[str, Slabs], orders: Mapping[str, Tensor]) -> None:
    atoms = {slabs.group.atom for slabs in chosen.values()}
    for name, slabs in chosen.items():
        if not slabs.atoms:
            raise InputError(
                f"The slabs of group {name!r} cannot be put in orders of their own: {slabs.refusal}. "
                "Choose the same positions in all of them, or let jettison choose (recipe balance)."
            )
        if not atoms.isdisjoint(slabs.atoms):
            raise InputError(f"Group {name!r} has slabs that are themselves put in order. Permute one after the other.")
        rows = torch.arange(slabs.group.size).expand(slabs.count, -1)
        if orders[name].shape != rows.shape or not torch.equal(orders[name].sort(1).values, rows):
            raise InputError(
                f"orders[{name!r}] has shape {tuple(orders[name].shape)}. "
                f"It must hold a permutation of {slabs.group.size} positions for each of {slabs.count} slabs."
            )


def _permute(tensor: Tensor, dims: Dims, slabs: Slabs, orders: Tensor) -> Tensor:
    """Gather along each dimension that holds the group; the slab may be numbered by another dimension."""
    for dim, term in enumerate(dims):
        if slabs.group.atom not in iterate_atoms(term):
            continue
        position, stride = locate(term, slabs.group.atom)
        slab = number_slabs(dims, slabs)
        here = along(position, dim, tensor.dim())
        source = torch.where(here >= 0, orders[slab.clamp(min=0), here.clamp(min=0)], here)
        shift = (source - here) * along(stride, dim, tensor.dim())
        index = along(torch.arange(term.size), dim, tensor.dim()) + shift
        tensor = torch.take_along_dim(tensor.detach(), index.to(tensor.device), dim)
    return tensor


def locate(term: Term, atom: Atom) -> tuple[Tensor, Tensor]:
    """Return for each position of `term` the position of `atom` it belongs to (-1: none), and how far the next is."""
    term = resolve(term)
    if isinstance(term, Atom):
        mine = torch.arange(term.size) if term is atom else torch.full((term.size,), -1)
        return mine, torch.ones(term.size, dtype=torch.long)
    if isinstance(term, Cat):
        parts = [locate(p, atom) for p in term.parts]
        return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])
    owner, stride = torch.full((1,), -1), torch.ones(1, dtype=torch.long)
    for factor in term.factors:
        mine, step = locate(factor, atom)
        both = (owner[:, None] >= 0).expand(-1, len(mine))
        stride = torch.where(both, stride[:, None] * factor.size, step[None, :]).flatten()
        owner = torch.where(both, owner[:, None], mine[None, :]).flatten()
    return owner, stride


def number_slabs(dims: Dims, slabs: Slabs) -> Tensor:
    """Return the number of each element's slab, in a shape that broadcasts to the tensor's; negative: in none.

    Of all dimensions exactly one holds each of the axes that number slabs.
    """
    number = torch.zeros([1] * len(dims), dtype=torch.long)
    for atom in slabs.atoms:
        dim, term = next((i, t) for i, t in enumerate(dims) if atom in iterate_atoms(t))
        number = number * atom.size + along(find_owners(term, atom), dim, len(dims))
    return number


def along(values: Tensor, dim: int, rank: int) -> Tensor:
    """Return a vector in the shape that broadcasts along one dimension of a tensor of that rank."""
    return values.reshape([-1 if i == dim else 1 for i in range(rank)])


# The proof


def check_slabs(graph: Graph, permuted: Graph, inputs: Sequence[Tensor]) -> float:
    """Return the largest difference of two networks that should be one, in float64, relative to 1 + the largest output.

    Raises VerificationError above `BALANCE_TOLERANCE`.
    """
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected, found = run_double(graph.module, wide), run_double(permuted.module, wide)
    scale = 1 + max((float(y.double().abs().max()) for y in expected if y.numel()), default=0.0)
    error = measure_difference(found, expected) / scale
    if not error <= BALANCE_TOLERANCE:
        raise VerificationError(
            f"Reordering positions inside slabs changed the network's output by {error:.2g} of the largest. "
            "This is a mistake in jettison. Set balance=False in the recipe, and report it."
        )
    return error


__all__ = ["Slabs", "along", "check_slabs", "find_slabs", "locate", "number_slabs", "permute_slabs"]
