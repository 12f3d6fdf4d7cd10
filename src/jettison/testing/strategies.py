"""Hypothesis strategies: random networks from blocks that split, join, group, shuffle, norm and attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import nn

from jettison.testing import blocks
from jettison.testing.models import Built, randomise

CHANNELS = (4, 6, 8, 12)
SPACE = 4
"""Height and width of every picture inside the random networks."""

T = TypeVar("T")
Drawn = tuple[nn.Module, int]
"""A block and the channels it gives."""


def _pick(draw: st.DrawFn, values: Sequence[T]) -> T:
    return draw(st.sampled_from(values))


def _pick_groups(draw: st.DrawFn, *channels: int) -> int:
    """One, two, or as many groups as the first has channels, where all are divisible."""
    return _pick(draw, [g for g in (1, 2, channels[0]) if all(c % g == 0 for c in channels)])


def _convolution(draw: st.DrawFn, channels: int, out: int) -> nn.Module:
    norm, activation = _pick(draw, tuple(blocks.NORMS)), _pick(draw, ("relu", "silu", "sigmoid", "hardswish"))
    return blocks.Convolve(channels, out, _pick_groups(draw, channels, out), norm, activation)


def _convolve(draw: st.DrawFn, channels: int) -> Drawn:
    out = _pick(draw, CHANNELS)
    return _convolution(draw, channels, out), out


def _add(draw: st.DrawFn, channels: int) -> Drawn:
    inner = _pick(draw, CHANNELS)
    return blocks.Add(nn.Sequential(_convolution(draw, channels, inner), _convolution(draw, inner, channels))), channels


def _join(draw: st.DrawFn, channels: int) -> Drawn:
    branches: list[nn.Module] = []
    while len(branches) < 2 and channels <= 12:
        out = _pick(draw, (2, 4))
        branches.append(_convolution(draw, channels, out))
        channels += out
    return blocks.Join(branches), channels


def _part(draw: st.DrawFn, channels: int) -> Drawn:
    at = draw(st.integers(1, channels - 1))
    by = _pick(draw, ("slice", "narrow", "tensor_split", "split"))
    return blocks.Part(at, _convolution(draw, at, at), by), channels


def _cross(draw: st.DrawFn, channels: int) -> Drawn:
    half, out = channels // 2, _pick(draw, CHANNELS)
    if channels % 2:
        return _gate(draw, channels)
    one, two = _convolution(draw, half, half), _convolution(draw, half, half)
    return blocks.CrossStage(one, two, _convolution(draw, 2 * channels, out)), out


def _mix(draw: st.DrawFn, channels: int) -> Drawn:
    groups = next((g for g in (2, 3, 5, 7) if channels % g == 0), 1)
    return blocks.Mix(groups, draw(st.booleans())), channels


def _gate(draw: st.DrawFn, channels: int) -> Drawn:
    return blocks.Gate(channels, draw(st.booleans())), channels


def _halve(draw: st.DrawFn, channels: int) -> Drawn:
    out = _pick(draw, CHANNELS)
    return blocks.Halve(channels, out, _pick(draw, ("chunk", "glu", "two"))), out


def _attend(draw: st.DrawFn, channels: int) -> Drawn:
    by = _pick(draw, ("chunk", "unbind", "reshape", "separate"))
    core = _pick(draw, ("default", "scaled", "by hand"))
    return blocks.Attend(channels, _pick(draw, (2, 3, 4)), by, core, draw(st.booleans())), channels


def _grouped_query(draw: st.DrawFn, channels: int) -> Drawn:
    by = _pick(draw, ("expand", "interleave", "flag"))
    return blocks.GroupedQuery(channels, _pick(draw, (2, 3)), by), channels


def _twice(draw: st.DrawFn, channels: int) -> Drawn:
    return blocks.Twice(_convolution(draw, channels, channels), channels, _pick(draw, (3, 5))), channels


def _hourglass(draw: st.DrawFn, channels: int) -> Drawn:
    hidden = _pick(draw, CHANNELS)
    groups = 0 if draw(st.booleans()) else _pick_groups(draw, hidden, channels)
    return blocks.Hourglass(channels, hidden, groups), channels


def _recur(draw: st.DrawFn, channels: int) -> Drawn:
    return blocks.Recur(channels, _pick(draw, (3, 5)), _pick(draw, ("lstm", "gru")), draw(st.booleans())), channels


def _line(draw: st.DrawFn, channels: int) -> Drawn:
    out = _pick(draw, CHANNELS)
    return blocks.Line(channels, out, _pick_groups(draw, channels)), out


def _choose(draw: st.DrawFn, channels: int) -> Drawn:
    return blocks.Choose(), channels


_BLOCKS: dict[str, Callable[[st.DrawFn, int], Drawn]] = {
    "convolve": _convolve,
    "add": _add,
    "join": _join,
    "part": _part,
    "cross": _cross,
    "mix": _mix,
    "gate": _gate,
    "halve": _halve,
    "attend": _attend,
    "grouped query": _grouped_query,
    "twice": _twice,
    "hourglass": _hourglass,
    "recur": _recur,
    "line": _line,
    "choose": _choose,
}
KINDS = tuple(_BLOCKS)
"""The kinds of blocks that random networks are made of."""


@st.composite
def networks(draw: st.DrawFn, blocks: int = 5, kinds: Sequence[str] = KINDS) -> Built:
    """Draw a network of up to `blocks` blocks of `kinds` with random tensors, in eval mode, and two pictures."""
    stem = channels = _pick(draw, CHANNELS)
    chosen = []
    for _ in range(draw(st.integers(1, blocks))):
        block, channels = _BLOCKS[_pick(draw, kinds)](draw, channels)
        chosen.append(block)
    net = _net(chosen, stem, channels, draw(st.booleans()))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    return randomise(net, seed), (torch.randn(2, 3, SPACE, SPACE, generator=generator),)


def _net(chosen: list[nn.Module], stem: int, channels: int, flatten: bool) -> nn.Module:
    return blocks.Net(chosen, stem, channels, SPACE, flatten)


__all__ = ["KINDS", "networks"]
