"""An exported program's tensors in its own graph: the module that torch itself would make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from jettison.graph.inline import inline_tensors
from jettison.graph.trace import NonFiniteError, trace_module


class Mixed(nn.Module):
    """Tied weights, a parameter that is not used, buffers saved and not saved, plain tensors, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("saved", torch.rand(4))
        self.register_buffer("made", torch.rand(4), persistent=False)
        self.plain = torch.rand(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x) * self.saved + self.made) * self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return torch.cond(y.sum() > 0, lambda v: v + self.a.bias, lambda v: v * 2, (y,))


class Counting(nn.Module):
    """Writes into a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


def _export(model: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model.eval(), (torch.randn(3, 4),), strict=False)


def _spell(module: fx.GraphModule) -> list[Any]:
    """List what each node does; arguments by their place, for a constant's node may go by another name."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    return [
        (n.op, str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), lambda m: order[m])), {*n.meta} - {"from_node"})
        for n in module.graph.nodes
    ]


def test_it_is_the_module_that_torch_makes() -> None:
    model = Mixed()
    ours, theirs = inline_tensors(_export(model)), _export(model).module(check_guards=False)
    assert isinstance(theirs, fx.GraphModule)
    assert _spell(ours) == _spell(theirs)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in ours.named_parameters())
    assert "saved" in ours.state_dict() and "made" not in ours.state_dict() and "made" in dict(ours.named_buffers())
    ours.graph.set_codegen(fx.graph.CodeGen())
    ours.recompile()
    x = torch.randn(3, 4)
    assert torch.equal(ours(x)[0], theirs(x))


def test_a_program_that_writes_is_left_to_torch() -> None:
    program = _export(Counting()).run_decompositions({})
    module = inline_tensors(program)
    assert module is not program.graph_module
    assert any(n.target is torch.ops.aten.copy_.default for n in module.graph.nodes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_large_weights_are_no_infinite_ones(bad: float) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(torch.float32).max)  # they add up to infinity
    trace_module(model, (torch.zeros(2, 4),))
    with torch.no_grad():
        model.weight[0, 0] = bad
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        trace_module(model, (torch.zeros(2, 4),))


class Reserved(nn.Module):
    """Its inputs are named by words of Python's own, as that of nn.Sequential is."""

    def forward(self, input: Tensor, max: Tensor) -> Tensor:
        return input + max.relu()


@pytest.mark.parametrize(
    ("model", "count"), [(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 1), (Reserved(), 2)]
)
def test_a_copy_keeps_the_names_of_all_nodes(model: nn.Module, count: int) -> None:
    traced = trace_module(model.eval(), tuple(torch.randn(3, 4) for _ in range(count)))
    copy = fx.Graph()
    copy.output(copy.graph_copy(traced.module.graph, {}))
    names = [n.name for n in traced.module.graph.nodes]
    assert [n.name for n in copy.nodes] == names
    assert list(traced.input_names) == [n.name for n in traced.module.graph.nodes if n.op == "placeholder"]
