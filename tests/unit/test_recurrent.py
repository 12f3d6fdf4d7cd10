"""LSTM, GRU and plain RNN: their hidden units are prune groups, proven against the masked original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jettison.cost.macs import count
from jettison.flow.costs import make_cost_model
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import prune_graph, refresh, slice_graph
from jettison.graph.surgery import slice_module
from jettison.graph.trace import get_tensor, set_tensor
from jettison.testing import (
    check_composition,
    check_masked,
    check_permutation,
    check_prediction,
    check_round_trip,
    draw_kept,
    randomise,
)

INPUTS, UNITS, STEPS = 5, 6, 4


class Tagger(nn.Module):
    """Projects each step, runs a recurrent module over the sequence and reads every step."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, 7)
        self.run = getattr(nn, kind)(7, UNITS, **options)
        self.head = nn.Linear((self.run.proj_size or UNITS) * (2 if self.run.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self.embed(x))[0])


class LastState(nn.Module):
    """Reads the last states, not the outputs; where asked, with states it makes itself to begin with."""

    def __init__(self, kind: str, start: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, 7)
        self.run = getattr(nn, kind)(7, UNITS, batch_first=True, **options)
        self.layers = self.run.num_layers * (2 if self.run.bidirectional else 1)
        self.first = nn.Parameter(torch.zeros(self.layers, 1, UNITS)) if start == "learned" else None
        self.prepare = nn.Linear(INPUTS, UNITS) if start == "computed" else None
        self.start, self.units = start, UNITS
        self.head = nn.Linear(2 * UNITS, 3)

    def forward(self, x: Tensor) -> Any:
        state: Tensor | None = None
        if self.first is not None:
            state = self.first.expand(self.layers, x.shape[0], self.units).contiguous()
        elif self.prepare is not None:
            state = torch.tanh(self.prepare(x.mean(1))).repeat(self.layers, 1, 1)
        elif self.start == "filled":
            state = x.new_full((self.layers, x.shape[0], self.units), 0.25)
        is_lstm = isinstance(self.run, nn.LSTM)
        given = (state, state) if is_lstm and state is not None else state
        last = self.run(self.embed(x), given)[1]
        hidden = last[1] if is_lstm else last
        return self.head(torch.cat([hidden[0], hidden[-1]], 1))


class Stepper(nn.Module):
    """Steps a cell by hand."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed, self.cell = nn.Linear(INPUTS, 7), getattr(nn, kind)(7, UNITS, **options)
        self.head = nn.Linear(UNITS, 3)

    def forward(self, x: Tensor) -> Any:
        state: Any = torch.zeros(x.shape[0], self.cell.hidden_size)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = self.cell(self.embed(x[:, step]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


NETWORKS: dict[str, tuple[Any, list[int]]] = {
    "lstm": (lambda: Tagger("LSTM"), [6, 7]),
    "lstm, no bias": (lambda: Tagger("LSTM", bias=False, batch_first=True), [6, 7]),
    "lstm, 2 layers, both ways": (lambda: Tagger("LSTM", num_layers=2, bidirectional=True), [6, 7]),
    "lstm, projected": (lambda: Tagger("LSTM", proj_size=4, num_layers=2, batch_first=True), [4, 7]),
    "lstm, projected, both ways": (lambda: Tagger("LSTM", proj_size=4, bidirectional=True, bias=False), [4, 7]),
    "gru": (lambda: Tagger("GRU", batch_first=True), [6, 7]),
    "gru, 2 layers, both ways": (lambda: Tagger("GRU", num_layers=2, bidirectional=True, bias=False), [6, 7]),
    "rnn": (lambda: Tagger("RNN", num_layers=3), [6, 7]),
    "rnn, relu": (lambda: Tagger("RNN", nonlinearity="relu", bidirectional=True), [6, 7]),
    "lstm, last state": (lambda: LastState("LSTM", "zeros", bidirectional=True), [6, 7]),
    "lstm, learned": (lambda: LastState("LSTM", "learned", num_layers=2), [6, 7]),
    "gru, computed": (lambda: LastState("GRU", "computed", bidirectional=True), [6, 7]),
    "rnn, filled": (lambda: LastState("RNN", "filled", num_layers=2), [6, 7]),
    "lstm cell": (lambda: Stepper("LSTMCell"), [6, 7]),
    "gru cell": (lambda: Stepper("GRUCell", bias=False), [6, 7]),
    "rnn cell": (lambda: Stepper("RNNCell", nonlinearity="relu"), [6, 7]),
}


def _trace(name: str, seed: int = 0) -> Graph:
    make, _ = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    return trace(randomise(make(), seed), torch.randn(STEPS, STEPS, INPUTS, generator=generator))


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_are_a_group_and_every_oracle_holds(name: str) -> None:
    graph = _trace(name)
    assert sorted(g.size for g in graph.groups) == NETWORKS[name][1] and not graph.opaque
    inputs = graph.traced.example
    for seed in range(3):
        keeps = graph.keeps(draw_kept(graph, seed=seed, share=0.0 if seed == 2 else 0.6))
        pruned = slice_graph(graph, keeps)
        for check in (check_masked(graph, pruned, keeps, inputs), check_prediction(graph, keeps, inputs)):
            assert check.passed, check
    for group in graph.groups:
        check = check_permutation(graph, group, inputs)
        assert check.passed, check
        for member in group.members:
            assert check_permutation(graph, group, inputs, without=member).value > 1e-6, member
    first = {g.name: list(range(1, g.size)) for g in graph.groups}
    second = {g.name: [0, *range(2, g.size)] for g in graph.groups}
    check = check_composition(graph, first, second, inputs)
    assert check.passed, check


@pytest.mark.parametrize("name", NETWORKS)
def test_the_callers_own_class_comes_out(name: str) -> None:
    make, _ = NETWORKS[name]
    model = randomise(make(), 1)
    x = torch.randn(STEPS, STEPS, INPUTS)
    graph = trace(model, x)
    keeps = graph.keeps(draw_kept(graph, seed=1))
    small = slice_module(model, graph, keeps).module
    assert type(small) is type(model)
    with torch.no_grad():
        expected = slice_graph(graph, keeps)(x)[0]
    # float32 sums in another order; every value is of order one
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lstm, 2 layers, both ways", "lstm, projected", "gru", "rnn", "gru cell"])
def test_macs_predicted_are_those_counted_and_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    graph = _trace(name)
    kept = draw_kept(graph, seed=3)
    small = prune_graph(graph, kept)
    check = check_round_trip(small, graph.traced.example, tmp_path)
    assert check.passed, check
    sliced = slice_graph(graph, graph.keeps(kept))
    refresh(sliced, graph, graph.keeps(kept))
    found = count(sliced)
    assert not found.uncounted and found.macs < count(graph.module).macs
    predicted = make_cost_model(graph, bits=32, latency=False, threads=1).predict({n: len(k) for n, k in kept.items()})
    assert predicted.macs == found.macs


def test_macs_are_those_of_the_matrices_at_each_step() -> None:
    graph = trace(nn.LSTM(3, 5, batch_first=True), torch.randn(2, 7, 3))
    assert count(graph.module).macs == 7 * 4 * 5 * (3 + 5)


def _misplace(module: nn.Module, name: str, rows: list[int]) -> None:
    set_tensor(module, name, get_tensor(module, name).detach()[rows])


@pytest.mark.parametrize("tensor", ["run.weight_ih_l0", "run.weight_hh_l0", "run.bias_ih_l0", "run.bias_hh_l0"])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_misread_gates_are_noticed(kind: str, gates: int, tensor: str) -> None:
    model = randomise(Tagger(kind), 0)
    x = torch.randn(STEPS, STEPS, INPUTS)
    graph = trace(model, x)
    keeps = graph.keeps({"run": [0, 1, 4]})
    assert check_masked(graph, slice_graph(graph, keeps), keeps, (x,)).passed
    kept = 3
    wrong_orders = {
        "two gates swapped": [*range(kept, 2 * kept), *range(kept), *range(2 * kept, gates * kept)],
        "units run slowest": [g * kept + u for u in range(kept) for g in range(gates)],
        "one gate turned": [*range((gates - 1) * kept), *reversed(range((gates - 1) * kept, gates * kept))],
    }
    for order in wrong_orders.values():
        pruned = slice_graph(graph, keeps)
        _misplace(pruned, tensor, order)
        check = check_masked(graph, pruned, keeps, (x,))
        assert not check.passed and check.value > 1e-6, check


def test_states_of_the_caller_and_states_given_back_stay_whole() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run, self.head = nn.GRU(INPUTS, UNITS, batch_first=True), nn.Linear(UNITS, 3)

        def forward(self, x: Tensor, state: Tensor) -> Any:
            y, state = self.run(x, state)
            return self.head(y), state

    graph = trace(Streaming(), (torch.randn(2, STEPS, INPUTS), torch.randn(1, 2, UNITS)))
    assert not graph.groups and not graph.opaque
    reasons = {f.reason for f in graph.frozen if f.what.startswith("run.weight_hh")}
    assert reasons == {"an input of the network (state)"}


def test_a_projection_keeps_its_units() -> None:
    graph = _trace("lstm, projected")
    assert any("tells its projection from its units" in f.reason for f in graph.frozen)


class Constants(nn.Module):
    """Tensors of one number that are joined and added: their written sizes follow the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)
        self.width = 6

    def forward(self, x: Tensor) -> Any:
        a = self.one(x) + torch.ones(x.shape[0], self.width)
        b = torch.where(self.two(x) > 0, self.two(x), x.new_zeros(x.shape[0], self.width))
        return self.out(torch.cat([a, b * torch.full((self.width,), 2.0)], 1))


def test_constants_of_one_number_are_resized_in_both_results() -> None:
    model = randomise(Constants(), 0)
    x = torch.randn(5, 4)
    graph = trace(model, x)
    assert sorted(g.size for g in graph.groups) == [6, 6] and not graph.opaque
    keeps = graph.keeps({g.name: [0, 2, 3] for g in graph.groups})
    check = check_masked(graph, slice_graph(graph, keeps), keeps, (x,))
    assert check.passed, check
    small = slice_module(model, graph, keeps).module
    assert vars(small)["width"] == 3
    torch.testing.assert_close(small(x), slice_graph(graph, keeps)(x)[0])


def test_numbers_that_tell_positions_apart_stay_whole() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.one(x) * torch.arange(6))

    assert not trace(Counted(), torch.randn(2, 4)).groups


@st.composite
def _recurrent_networks(draw: st.DrawFn) -> nn.Module:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if kind == "LSTM" and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(2, UNITS - 1))
    return randomise(Tagger(kind, **options), draw(st.integers(0, 99)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(_recurrent_networks(), st.integers(0, 99))
def test_random_recurrent_networks(model: nn.Module, seed: int) -> None:
    graph = trace(model, torch.randn(STEPS, STEPS, INPUTS, generator=torch.Generator().manual_seed(seed)))
    keeps = graph.keeps(draw_kept(graph, seed=seed))
    check = check_masked(graph, slice_graph(graph, keeps), keeps, graph.traced.example)
    assert check.passed and len(graph.groups) == 2, check
