"""Recurrent layers on integers, as torch operators: one layer, in one direction, over whole sequences.

Sequences lie as `(steps, batch, features)`. The ranges are ONNX Runtime's: one for a layer's whole input, and at each
step one for the state that all sequences of the call hand on (its LSTM kernel with several threads takes a range for as
many sequences as one thread has). Sums are float32 sums of what the integers stand for, as in `operators`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from jettison.targets.integer import Levels, fake_quantize
from jettison.targets.operators import choose_dynamic

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WEIGHTS = "Tensor w, Tensor w_scale, Tensor r, Tensor r_scale, Tensor bias"
"""`w` (features, gates x units) and `r` (units, gates x units) are int8, with a scale for each output; `bias` is
float32, that of the input's product first, then that of the state's."""
CELLS = ("gru", "tanh", "relu")
"""The cells of `scan_operator`: nn.GRU, and nn.RNN with either activation."""


@functools.cache
def lstm_operator() -> Any:
    """Return `jettison::lstm_dynamic(x, h, c, w, w_scale, r, r_scale, bias, reverse)`: outputs and last states.

    Gates stand in ONNX's order: input, output, forget, cell. States are (1, batch, units), as are the weights but for
    their first dimension, which is 1, too.
    """
    import torch

    def compute(x: Tensor, h: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *weights, reverse = rest

        def step(gates: Tensor, given: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entry, out, forget, cell = (gates + given).chunk(4, -1)
            kept = torch.sigmoid(forget) * state[1] + torch.sigmoid(entry) * torch.tanh(cell)
            return torch.sigmoid(out) * torch.tanh(kept), kept

        y, (last, kept) = _run(x, (h, c), [value[0] for value in weights], reverse, step)
        return y, last, kept

    def describe(x: Tensor, h: Tensor, c: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _make_output(x, h), torch.empty_like(h), torch.empty_like(c)

    signature = f"lstm_dynamic(Tensor x, Tensor h, Tensor c, {WEIGHTS}, bool reverse) -> (Tensor, Tensor, Tensor)"
    _define(signature, compute, describe)
    return torch.ops.jettison.lstm_dynamic.default


@functools.cache
def scan_operator() -> Any:
    """Return `jettison::scan_dynamic(x, h, w, w_scale, r, r_scale, bias, reverse, cell)`: outputs and last state.

    `cell` is one of `CELLS`; a GRU's gates stand in the order update, reset, new. The state is (1, batch, units).
    """
    import torch

    def compute(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *weights, reverse, cell = rest

        def step(gates: Tensor, given: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if cell != "gru":
                return ((torch.tanh if cell == "tanh" else torch.relu)(gates + given),)
            units = state[0].shape[-1]
            update, reset = torch.sigmoid(gates[..., : 2 * units] + given[..., : 2 * units]).chunk(2, -1)
            new = torch.tanh(gates[..., 2 * units :] + reset * given[..., 2 * units :])
            return (new + update * (state[0] - new),)

        y, (last,) = _run(x, (h,), weights, reverse, step)
        return y, last

    def describe(x: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _make_output(x, h), torch.empty_like(h)

    signature = f"scan_dynamic(Tensor x, Tensor h, {WEIGHTS}, bool reverse, str cell) -> (Tensor, Tensor)"
    _define(signature, compute, describe)
    return torch.ops.jettison.scan_dynamic.default


def _run(
    x: Tensor, states: tuple[Tensor, ...], weights: Any, reverse: bool, step: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer: `step` gets the two products of a step, biases added, and the states, and gives the new ones."""
    import torch

    w, w_scale, r, r_scale, bias = weights
    first, second = bias.chunk(2)
    gates = _round(x) @ (w.to(torch.float32) * w_scale) + first
    matrix = r.to(torch.float32) * r_scale
    state, outputs = tuple(s[0] for s in states), []
    for now in gates.flip(0) if reverse else gates:
        state = step(now, _round(state[0]) @ matrix + second, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), tuple(s.unsqueeze(0) for s in state)


def _round(x: Tensor) -> Tensor:
    return fake_quantize(x, *choose_dynamic(x), Levels(0, 255, False))


def _make_output(x: Tensor, h: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], h.shape[2]))


def _define(signature: str, compute: Any, describe: Any) -> None:
    import torch

    name, _, arguments = signature.partition("(")
    torch.library.define(f"jettison::{name}", f"({arguments}")
    torch.library.impl(f"jettison::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_fake(f"jettison::{name}", describe)
