"""Blocks of a converted graph: stretches between tensors that alone carry everything from one side to the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from jettison.quantization.clamps import read_clamp
from jettison.quantization.convert import is_integer
from jettison.quantization.fold import name_operator
from jettison.quantization.replay import UNFOLDED, Batches, find_constants

MOST = 3
"""Neighbouring blocks of one layer each are joined up to so many layers, as an inverted bottleneck has."""


@dataclass(frozen=True)
class Block:
    """What is computed after `entry` (a quantization) up to `exit`; both have their tensor in the float graph."""

    entry: Node
    exit: Node
    nodes: tuple[Node, ...]
    source: Node
    target: Node


def find_blocks(folded: GraphModule, converted: GraphModule) -> list[Block]:
    """Return the blocks with integer layers, in the order of the graph.

    What stands before the first quantized tensor, and after the last where there are several outputs, is in none.
    """
    constants = find_constants(converted)
    nodes = list(converted.graph.nodes)
    cuts = list(_find_cuts(converted, constants))
    (ending,) = (n for n in nodes if n.op == "output")
    outputs = ending.all_input_nodes
    if len(outputs) == 1 and outputs[0] not in constants and outputs[0] not in cuts:
        cuts.append(outputs[0])
    place = {node: index for index, node in enumerate(nodes)}
    blocks: list[Block] = []
    counts: list[int] = []
    for entry, end in itertools.pairwise(cuts):
        inside = tuple(n for n in nodes[place[entry] + 1 : place[end] + 1] if n not in constants)
        count = sum(name_operator(n) in UNFOLDED and is_integer(n) for n in inside)
        block = Block(entry, end, inside, find_float(folded, entry), find_float(folded, end))
        joins = bool(blocks) and (count == 0 or (counts[-1] + count <= MOST and count == 1 and _is_chain(blocks[-1])))
        if joins:
            last = blocks.pop()
            block = Block(last.entry, end, (*last.nodes, *inside), last.source, block.target)
            count += counts.pop()
        blocks.append(block)
        counts.append(count)
    return [block for block, count in zip(blocks, counts, strict=True) if count]


def _is_chain(block: Block) -> bool:
    """Say if nothing in a block joins two tensors."""
    return not any(name_operator(node) in ("aten.add.Tensor", "aten.cat.default") for node in block.nodes)


def _find_cuts(module: GraphModule, constants: frozenset[Node]) -> Iterator[Node]:
    """Give the quantizations after which nothing else is still to be read."""
    open_readers: dict[Node, int] = {}
    for node in module.graph.nodes:
        if node in constants or node.op == "output":
            continue
        for source in node.all_input_nodes:
            if source in open_readers:
                open_readers[source] -= 1
                if open_readers[source] == 0:
                    del open_readers[source]
        carries = isinstance(node.meta.get("val", torch.empty(0)), Tensor)  # a size is known without being carried
        readers = [user for user in node.users if "sym_size" not in name_operator(user)]
        if carries and readers:
            open_readers[node] = len(readers)
        if str(node.target) == "jettison.quantize_per_tensor.default" and list(open_readers) == [node]:
            yield node


def find_float(folded: GraphModule, node: Node) -> Node:
    """Return the node of the float graph that gives what `node` of the converted graph stands for."""
    source = node.args[0] if str(node.target) == "jettison.quantize_per_tensor.default" else node
    assert isinstance(source, Node)
    found: Node = next(n for n in folded.graph.nodes if n.name == source.name)
    users = list(found.users)
    # The converted graph leaves the clamp to the range.
    if len(users) == 1 and read_clamp(users[0]) is not None and read_clamp(source) is None and source is not node:
        return users[0]
    return found


class _Gradients(Interpreter):
    """Runs a float graph and keeps some of its values with their gradients."""

    def __init__(self, module: GraphModule, wanted: frozenset[Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node; where no gradient comes from before, it begins here."""
        result = super().run_node(n)
        if n in self.wanted and isinstance(result, Tensor) and result.is_floating_point():
            if result.requires_grad:
                result.retain_grad()
            else:
                result = result.detach().requires_grad_(True)
            self.kept[n] = result
        return result


def measure_gradients(
    folded: GraphModule, targets: Sequence[Node], batches: Batches, *, seed: int = 0
) -> dict[Node, Tensor]:
    """Return for each node the mean squared gradient of each channel, of mean 1, shaped to multiply its value.

    The loss is the cross-entropy with classes drawn from the network's own output, whose squared gradient estimates the
    Fisher information; outputs that are no class scores are projected on normal numbers.
    """
    sums: dict[Node, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            run = _Gradients(folded, frozenset(targets))
            outputs = [y for y in run.run(*batch) if isinstance(y, Tensor) and y.is_floating_point()]
            loss = torch.stack([_draw_loss(y) for y in outputs]).sum()
            if not loss.requires_grad:
                return {}
            loss.backward()
            for node, value in run.kept.items():
                if value.grad is None:
                    continue
                axis = 1 if value.ndim in (2, 4) else value.ndim - 1
                others = [i for i in range(value.ndim) if i != axis]
                found = value.grad.square().mean(others, keepdim=True)
                sums[node] = sums[node] + found if node in sums else found
    return {node: total / total.mean() for node, total in sums.items() if float(total.mean()) > 0}


def _draw_loss(output: Tensor) -> Tensor:
    if output.ndim == 2 and output.shape[1] > 1:
        labels = torch.multinomial(output.detach().softmax(1), 1).squeeze(1)
        return F.cross_entropy(output, labels, reduction="sum")
    return (output * torch.randn_like(output)).sum()
