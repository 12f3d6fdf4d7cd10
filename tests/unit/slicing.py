"""What the tests of the eager result share: prune a network and check what must hold of every such result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jettison.graph.axes import Keeps
from jettison.graph.comparing import list_tensors
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import slice_graph
from jettison.graph.surgery import Eager, rebuild, slice_module
from jettison.graph.trainable import TrainableGraph


def randomise(model: nn.Module) -> nn.Module:
    """Give every tensor, BatchNorm statistics included, values that a wrong slice would show."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.3)
    return model


def thin(graph: Graph, only: Callable[[str], bool] = lambda name: True) -> Keeps:
    """Drop the first and every third position of the groups chosen."""
    return graph.keeps({g.name: [i for i in range(g.size) if i % 3] for g in graph.groups if only(g.name)})


def prune(
    model: nn.Module, *inputs: Tensor, keeps: Callable[[Graph], Keeps] = thin, kw: dict[str, Tensor] | None = None
) -> Eager:
    """Slice, and check what must hold of every eager result."""
    untouched = copy.deepcopy(model)
    randomise(model)
    state = {n: t.clone() for n, t in list_tensors(model).items()}
    attributes = [dict(vars(m)) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        before = model(*inputs, **(kw or {}))
    model.train()
    graph = trace(model, inputs, kw)
    chosen = keeps(graph)
    assert chosen and any(not v.all() for v in chosen.values()), "nothing is pruned"
    eager = slice_module(model, graph, chosen)
    small = eager.module

    assert type(small) is type(model)
    assert model.training and small.training
    assert list(small.state_dict()) == list(model.state_dict())
    flat = slice_graph(graph, chosen)
    own = list_tensors(small)
    for name, tensor in list_tensors(flat).items():
        assert torch.equal(tensor, own[name]) if name in own else name not in state  # a constant of the graph's
    for old, new in zip(model.parameters(), small.parameters(), strict=True):
        assert isinstance(new, nn.Parameter) and old.requires_grad == new.requires_grad and old is not new
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())

    for module, old_attributes in zip(model.modules(), attributes, strict=True):
        for name, value in old_attributes.items():
            if isinstance(value, (int, tuple)):
                assert type(vars(module)[name]) is type(value) and vars(module)[name] == value
    for module in small.modules():
        assert all(type(v) in (int, bool) for v in vars(module).values() if isinstance(v, int))
    assert all(torch.equal(t, state[n]) for n, t in list_tensors(model).items())
    model.eval()
    with torch.no_grad():
        after = model(*inputs, **(kw or {}))
    assert torch.equal(before, after)

    fresh = randomise(untouched)
    saved = {n: t.clone() for n, t in list_tensors(small).items()}
    parts = {path: small.get_submodule(path) for path in eager.replaced}
    assert all(isinstance(part, TrainableGraph) for part in parts.values())
    again = rebuild(fresh, saved, json.loads(json.dumps(eager.attributes)), parts)  # type: ignore[arg-type]
    small.eval(), again.eval()
    with torch.no_grad():
        out = small(*inputs, **(kw or {}))
        assert torch.equal(out, again(*inputs, **(kw or {})))
        assert torch.equal(out, copy.deepcopy(small)(*inputs, **(kw or {})))
    assert [m.__dict__.keys() for m in small.modules()] == [m.__dict__.keys() for m in again.modules()]
    return eager


def attributes_of(eager: Eager) -> dict[str, Any]:
    return {f"{a['module']}.{a['name']}".lstrip("."): a["value"] for a in eager.attributes}


class InPlace(nn.Module):
    """An operator that changes its input makes the trace decompose the graph: other operators, the same lines."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.act = inner, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x) + 1)
