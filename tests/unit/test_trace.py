"""Tracing: what the graph keeps of the caller's network, and how each wrong input ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.core.errors import InputError, NonFiniteError, ShapeError, TraceError
from jettison.graph.groups import trace
from jettison.graph.trace import nest, run_nodes, trace_module
from jettison.testing import MODELS, build_model

EXACT = 1e-6
"""float32 rounding of the same operators."""


@pytest.mark.parametrize("name", MODELS)
def test_the_flat_graph_computes_the_same(name: str) -> None:
    model, inputs = build_model(name)
    traced = trace_module(model, inputs)
    assert traced.dynamic_batch
    expected = torch.utils._pytree.tree_leaves(model(*inputs))
    found = traced.module(*inputs)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=EXACT)


def test_nesting_comes_back() -> None:
    model, inputs = build_model("several")
    traced = trace_module(model, inputs)
    nested = nest(traced.module, traced.in_spec, traced.out_spec)
    found, expected = nested(*inputs), model(*inputs)
    assert list(found) == ["score", "boxes"] and isinstance(found["boxes"], list)
    assert torch.allclose(found["boxes"][0], expected["boxes"][0], atol=EXACT)


def test_keyword_inputs() -> None:
    model, (picture, numbers) = build_model("several")
    traced = trace_module(model, (picture,), {"numbers": numbers})
    assert traced.input_names == ("picture", "numbers") and traced.dynamic_batch
    found = nest(traced.module, traced.in_spec, traced.out_spec)(picture, numbers=numbers)
    assert torch.allclose(found["score"], model(picture, numbers)["score"], atol=EXACT)


class Spread(nn.Module):
    """Takes any number of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, *parts: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(torch.stack(parts).sum(0))))
        return y


def test_any_number_of_inputs() -> None:
    model = Spread().eval()
    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    graph = trace(model, inputs)
    assert [g.name for g in graph.groups] == ["a"]
    assert torch.allclose(graph.module(*inputs)[0], model(*inputs), atol=EXACT)


def test_a_batch_of_one_leaves_the_batch_free() -> None:
    model, (x,) = build_model("residual")
    traced = trace_module(model, (x[:1],))
    assert traced.dynamic_batch
    assert torch.allclose(traced.module(x)[0], model(x), atol=EXACT)


class Fixed(nn.Module):
    """Writes its batch into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x).reshape(2, 4)))
        return y


def test_a_written_batch_is_fixed() -> None:
    graph = trace(Fixed().eval(), torch.randn(2, 3))
    assert not graph.traced.dynamic_batch
    assert "batch fixed at 2" in str(graph)
    assert [g.name for g in graph.groups] == ["a"]


def test_train_mode_comes_back_and_nothing_changes() -> None:
    model, inputs = build_model("residual")
    model.train()
    model.get_submodule("norm").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    graph = trace(model, inputs)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    assert torch.allclose(graph.module(*inputs)[0], model(*inputs), atol=EXACT)


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.a(x)
        return y


def test_buffers_that_forward_changes_come_back() -> None:
    model = Counting()
    trace(model, torch.randn(2, 3))
    assert float(model.seen) == 0


def test_frozen_parts_name_the_users_line() -> None:
    graph = trace(*build_model("attention"))
    part = next(p for p in graph.frozen if p.what == "qkv.weight (dimension 0)")
    assert "models.py:" in part.where
    assert any(p.what == "head.weight (dimension 0)" and "output" in p.reason for p in graph.frozen)


def test_running_node_by_node() -> None:
    model, inputs = build_model("dense")
    traced = trace_module(model, inputs)
    nodes = [(node, value) for node, value, _ in run_nodes(traced.module, traced.example)]
    assert nodes[-1][0].op == "output"
    assert torch.equal(nodes[-1][1][0], traced.module(*traced.example)[0])


def test_what_is_no_module() -> None:
    nothing: Any = lambda x: x  # noqa: E731 - a function is the mistake people make
    with pytest.raises(InputError, match=r"Expected a torch\.nn\.Module, got function"):
        trace(nothing, torch.randn(1, 3))


def test_nan_weights() -> None:
    model, inputs = build_model("residual")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'stem\.weight' holds 1 NaN"):
        trace(model, inputs)


def test_nan_inputs() -> None:
    model, (x,) = build_model("residual")
    with pytest.raises(NonFiniteError, match="An input of shape"):
        trace(model, x * torch.inf)


class Logarithm(nn.Module):
    """Has no finite answer for negative inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_nan_outputs() -> None:
    with pytest.raises(NonFiniteError, match="own output"):
        trace(Logarithm(), -torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3), (2, 3, 0, 8)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    model, _ = build_model("flatten")
    with pytest.raises(ShapeError, match="does not take inputs of shape"):
        trace(model, torch.randn(shape))


def test_too_many_inputs() -> None:
    model, (x,) = build_model("residual")
    with pytest.raises(ShapeError):
        trace(model, (x, x))


class Deciding(nn.Module):
    """Control flow that depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y if y.sum() > 0 else -y


def test_control_flow_on_values() -> None:
    with pytest.raises(TraceError, match=r"torch\.export cannot follow .*test_trace\.py:\d+.*torch\.cond"):
        trace(Deciding(), torch.randn(2, 3))


def test_inputs_that_are_no_tensors() -> None:
    class Flagged(nn.Module):
        def forward(self, x: Tensor, flag: bool) -> Tensor:
            return x if flag else -x

    with pytest.raises(TraceError, match="not a tensor"):
        trace(Flagged(), (torch.randn(2, 3), True))


def test_buffers_may_be_infinite_but_not_nan() -> None:
    """Masks and clipping bounds hold infinity; NaN is sound nowhere."""

    class Bounded(nn.Module):
        def __init__(self, bound: float) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.register_buffer("bound", torch.tensor(bound))

        def forward(self, x: Tensor) -> Tensor:
            return torch.minimum(self.layer(x), self.bound)

    assert trace(Bounded(float("inf")), torch.randn(2, 4)).groups == ()
    with pytest.raises(NonFiniteError, match="'bound'"):
        trace(Bounded(float("nan")), torch.randn(2, 4))
