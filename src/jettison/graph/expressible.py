"""Which prune groups a network's own source can express smaller: where its class is to stay, the rest stays whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx, nn

from jettison.core.errors import FixedSize
from jettison.graph.analyse import list_terms
from jettison.graph.axes import Atom, Keeps, is_touched, iterate_atoms
from jettison.graph.groups import Graph
from jettison.graph.matching import node_module
from jettison.graph.surgery import find_misfits


def find_inexpressible(model: nn.Module, graph: Graph, kept: Mapping[str, Iterable[int]]) -> dict[str, str]:
    """Return the groups of `kept` that the source of `model` cannot lose positions of, each with the reason.

    Found by trying: the network is pruned in its own class; where a submodule cannot follow, the groups that change
    its own calls are left whole (else those of its inputs, else all inside it), and it is tried again. This errs on
    the side of leaving too much. Raises FixedSize where a submodule cannot follow although nothing in it changes.
    """
    names = {g.atom: g.name for g in graph.groups}
    keeps = dict(graph.keeps(kept))
    reasons: dict[str, str] = {}
    while keeps:
        misfits = find_misfits(model, graph, keeps)
        if not misfits:
            break
        blamed = {atom: str(m) for m in reversed(misfits) for atom in _blame(graph, m.module, keeps)}
        if not blamed:
            raise FixedSize(str(misfits[0]))
        for atom, reason in blamed.items():
            reasons[names[atom]] = reason
            del keeps[atom]
    return reasons


def explain_whole(reasons: Mapping[str, str]) -> str:
    """Say in one sentence how many prune groups stay whole, with the first of the `reasons`; there is at least one."""
    name, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} prune groups stay whole, for the network's source fixes their sizes, first {name!r}. {reason}"
    )


def _blame(graph: Graph, path: str, keeps: Keeps) -> set[Atom]:
    """Return the axes whose sizes a submodule's own calls depend on, as closely as can be told."""
    own = [n for n in graph.module.graph.nodes if n.op == "call_function" and node_module(n) == path]
    read = [n for node in own for n in node.all_input_nodes]
    inside = [n for n in graph.module.graph.nodes if f"{node_module(n)}.".startswith(f"{path}." if path else "")]
    for nodes in (own, [*own, *read], inside):
        found = _list_changed(graph, nodes, keeps)
        if found:
            return found
    return set()


def _list_changed(graph: Graph, nodes: Iterable[fx.Node], keeps: Keeps) -> set[Atom]:
    changed = set()
    for node in nodes:
        for term in list_terms(graph.axes.terms.get(node)):
            if is_touched(term, keeps):
                changed |= {a for a in iterate_atoms(term) if a in keeps}
    return changed
