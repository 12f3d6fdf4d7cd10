"""Operators in place become plain ones where that is the same, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.graph import trace as tracing
from jettison.graph.functional import mutates, replace_writes
from jettison.graph.subgraphs import iterate_nodes
from jettison.graph.trace import trace_module


class Calls(nn.Module):
    """A linear layer before a function under test."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(4, 6), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


def read_again(y: Tensor) -> Tensor:
    """What is written is read under its old name too."""
    z = F.relu(y, inplace=True)
    return y + 2 * z


def read_before(y: Tensor) -> Tensor:
    """What was read before the write saw the old numbers."""
    z = y * 3
    y.relu_()
    return y + z


def write_twice(y: Tensor) -> Tensor:
    return F.hardtanh(y.relu_().add_(1.0), 0.0, 1.5, inplace=True)


def write_through_a_view(y: Tensor) -> Tensor:
    y[:, :3].relu_()
    return y


def write_under_a_view(y: Tensor) -> Tensor:
    view = y.view(-1)
    y.relu_()
    return view.view_as(y) + y


def write_behind_dropout(y: Tensor) -> Tensor:
    """In eval mode dropout gives its argument itself."""
    z = F.dropout(y, 0.5, training=False)
    z.relu_()
    return y + F.dropout(y, 0.5, training=False) * z


def write_another_type(y: Tensor) -> Tensor:
    counts = torch.ones_like(y, dtype=torch.int64)
    return y.add_(counts)


SIMPLE = [read_again, read_before, write_twice, write_behind_dropout]
OTHERS = [write_through_a_view, write_under_a_view, write_another_type]


@pytest.mark.parametrize("then", [*SIMPLE, *OTHERS], ids=lambda f: f.__name__)
def test_the_graph_computes_what_the_module_does(then: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Calls(then).eval(), torch.randn(3, 4)
    traced = trace_module(model, (x,))
    assert torch.allclose(traced.module(x)[0], model(x), atol=1e-6)
    assert not any(map(mutates, iterate_nodes(traced.module)))


@pytest.mark.parametrize("then", SIMPLE, ids=lambda f: f.__name__)
def test_simple_writes_need_no_second_trace(then: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    trace_module(Calls(then).eval(), (torch.randn(3, 4),))


@pytest.mark.parametrize("then", OTHERS, ids=lambda f: f.__name__)
def test_other_writes_are_not_touched(then: Callable[[Tensor], Tensor]) -> None:
    program = torch.export.export(Calls(then).eval(), (torch.randn(3, 4),), strict=False)
    module = program.module(check_guards=False)
    before = str(module.graph)
    assert not replace_writes(module) and str(module.graph) == before


def test_a_write_taken_for_simple_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails where a view's owner is written as if nobody else held it."""
    monkeypatch.setattr("jettison.graph.functional._shares_memory", lambda node: False)
    monkeypatch.setattr(tracing, "replace_writes", replace_writes)
    torch.manual_seed(0)
    model, x = Calls(write_through_a_view).eval(), torch.randn(3, 4)
    assert not torch.allclose(trace_module(model, (x,)).module(x)[0], model(x), atol=1e-6)
