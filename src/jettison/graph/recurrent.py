"""Rules for recurrent operators: LSTM, GRU and plain RNN, over whole sequences and step by step.

All layers and directions of one call share one hidden axis: their states are stacked in one tensor, and `nn.LSTM` has
one `hidden_size`. A matrix of gates is that axis several times over, one gate after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from jettison.graph.analyse import Dims, Walk
from jettison.graph.axes import Cat, Term

aten = torch.ops.aten

GATES: dict[Any, int] = {
    aten.lstm: 4,
    aten.gru: 3,
    aten.rnn_tanh: 1,
    aten.rnn_relu: 1,
    aten.lstm_cell: 4,
    aten.gru_cell: 3,
    aten.rnn_tanh_cell: 1,
    aten.rnn_relu_cell: 1,
}
"""How many gates each recurrent operator computes, stacked in its weights."""


@dataclass(frozen=True)
class _State:
    """The axes a layer hands from step to step: `hidden` counts its units, `out` is what it gives away.

    They are one axis, unless an LSTM projects its units (`proj_size`).
    """

    hidden: Term
    out: Term
    is_projected: bool


def recurrence(walk: Walk) -> Any:
    """Read x[B, T, I] or x[T, B, I] with states[layers x directions, B, H] and the weights of each layer and direction.

    Packed sequences, whose batch changes from step to step, are left to the opaque case.
    """
    if walk.node.target._overloadname != "input":  # type: ignore[union-attr]
        return None
    x, states = walk.dims(walk.args[0]), _states(walk, walk.args[1])
    weights, is_biased, layers = walk.args[2], walk.arg(3, "has_biases"), walk.arg(4, "num_layers")
    bidirectional, batch_first = walk.arg(7, "bidirectional"), walk.arg(8, "batch_first")
    batch, steps = (x[0], x[1]) if batch_first else (x[1], x[0])
    walk.fix(steps, because="a recurrence runs along it")
    for given in states:
        walk.fix(given[0], because="one state per layer and direction")
        walk.same(given[1], batch)
    directions = 2 if bidirectional else 1
    calls = layers * directions
    count = len(weights) // calls
    state = _join(walk, states, is_projected=count > (4 if is_biased else 2))
    feature: Term = x[2]
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * count
            _read_weights(walk, feature, state, weights[first : first + count])
        feature = Cat((state.out,) * directions) if directions > 1 else state.out
    return ((*x[:2], feature), *((walk.fixed(calls, "one state per layer and direction"), *s[1:]) for s in states))


def recurrent_step(walk: Walk) -> Any:
    """Read one step x[B, I] with states[B, H]: the cells."""
    x, states = walk.dims(walk.args[0]), _states(walk, walk.args[1])
    if len(x) != 2:
        return None
    for given in states:
        walk.same(given[0], x[0])
    joined = _join(walk, states, is_projected=False)
    weights = [walk.args[2], walk.args[3], walk.arg(4, "b_ih"), walk.arg(5, "b_hh")]
    _read_weights(walk, x[1], joined, [w for w in weights if isinstance(w, fx.Node)])
    out = tuple((x[0], joined.out) for _ in states)
    return out if len(states) == 2 else out[0]


def _states(walk: Walk, argument: Any) -> list[Dims]:
    """Return the axes of the given states: two for an LSTM, one for the others."""
    return [walk.dims(a) for a in (argument if isinstance(argument, (list, tuple)) else [argument])]


def _join(walk: Walk, states: Sequence[Dims], *, is_projected: bool) -> _State:
    """An LSTM's output is its first state, its units are the second; without a projection they are one axis."""
    out, hidden = states[0][-1], states[-1][-1]
    if is_projected:
        # torch reads equal sizes of the two states as "no projection", so units may never shrink to the outputs' size.
        walk.fix(hidden, because="an LSTM tells its projection from its units by their sizes")
    else:
        walk.same(out, hidden)
    return _State(hidden, out, is_projected)


def _read_weights(walk: Walk, feature: Term, state: _State, weights: Sequence[Any]) -> None:
    """Read one layer in one direction: weights for input and state, biases if any, and a projection if any."""
    gates = Cat((state.hidden,) * GATES[walk.node.target.overloadpacket])  # type: ignore[union-attr]
    dims = [walk.dims(w) for w in weights]
    walk.same(dims[0][1], feature)
    walk.same(dims[1][1], state.out)
    if state.is_projected:
        projection = dims.pop()
        walk.same(projection[0], state.out)
        walk.same(projection[1], state.hidden)
    for rows in dims:
        walk.same(rows[0], gates)


__all__ = ["GATES", "recurrence", "recurrent_step"]
