"""Block reconstruction (BRECQ, Li et al., 2021) with QDrop (Wei et al., 2022): learn the rounding of a whole block.

A block lies between two tensors that alone carry everything from one side to the other; in a residual network that is a
residual block. Its roundings are learned together by its output's error, weighed channel by channel with the squared
gradient of the loss; while learning, every quantized number of an activation is replaced by the float one with some
probability. Below 8 bits the activations' steps are learned as well (LSQ, Esser et al., 2020). Departures: biases are
learned too; that probability falls from 1/2 to 0, so that the end is learned as it will run; the gradient is kept per
channel, not per element, which costs one run and no memory; learning starts at the integers that are there, GPTQ's for
one; and a block that did not get better keeps what it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from jettison.progress import track
from jettison.quantization.adaround import choose_rate, measure_doubt, soften, start_rounding
from jettison.quantization.bits import read_levels
from jettison.quantization.blocks import Block, find_blocks, measure_gradients
from jettison.quantization.convert import is_integer
from jettison.quantization.fold import copy_graph, find_layers, name_operator, read_attribute
from jettison.quantization.replay import UNFOLDED, Batches, Replay
from jettison.quantization.weights import Weight, read_weight, write_weight
from jettison.targets.integer import IntegerScheme, Levels

STEPS = 400
BATCH = 32
DROP = 0.5
WAY = 0.5
"""How far from the integers towards the weights learning starts: from the weights themselves it needs hundreds of steps
more to come back to what GPTQ found."""
GROWTH_RATE = 2e-3
"""Learning rate of the logarithm of an activation's step."""
BIAS_TRAVEL = 3.0
"""Learning rate times steps of a bias, in units of its layer's mean one. With 0.2, 100 steps from rounding to
nearest took back less than correcting the biases alone."""
QUANTIZE, DEQUANTIZE = "jettison.quantize_per_tensor.default", "quantized_decomposed.dequantize_per_tensor.default"


@dataclass
class Learner:
    """A block that can be run with soft roundings: `weights` by call, `growth` by quantization, `hard` once decided."""

    replay: Replay
    block: Block
    weights: dict[Node, tuple[Weight, Tensor, Tensor, Levels]]
    growth: dict[Node, Tensor]
    shifts: dict[Node, Tensor]
    hard: bool = False
    begun: bool = field(default=True)
    """Whether to run the integers the block began with."""

    def run(self, x: Tensor, generator: torch.Generator | None = None, drop: float = 0.0) -> Tensor:
        """Return the block's output for a float input, each number left unrounded with probability `drop`."""
        values: dict[Node, Any] = {self.block.entry: x}

        def look_up(node: Node) -> Any:
            if node in values:
                return values[node]
            return len(x) if "sym_size" in name_operator(node) else self.replay.evaluate(node)

        for node in self.block.nodes:
            target = str(node.target)
            if target == DEQUANTIZE:
                values[node] = look_up(node.args[0])  # type: ignore[arg-type]
            elif target == QUANTIZE:
                source = look_up(node.args[0])  # type: ignore[arg-type]
                values[node] = self._round(node, source, generator, 0.0 if node is self.block.exit else drop)
            elif node in self.weights:
                weight, bias = self._read(node)
                values[node] = node.target(look_up(node.args[0]), weight, bias, *node.args[3:])  # type: ignore[arg-type, operator]
            else:
                values[node] = node.target(*map_arg(node.args, look_up), **map_arg(node.kwargs, look_up))  # type: ignore[operator]
        result = values[self.block.exit]
        assert isinstance(result, Tensor)
        return result

    def _read(self, node: Node) -> tuple[Tensor, Tensor | None]:
        weight = self.weights[node][0]
        integers = weight.integers if self.begun else self.decide(node)
        return integers * weight.scale.view(-1, *[1] * (integers.ndim - 1)), self.shift(node)

    def shift(self, node: Node) -> Tensor | None:
        """Return a layer's bias as learned so far."""
        bias = self.weights[node][0].bias
        return bias if bias is None or self.begun else bias + self.shifts[node] * bias.abs().mean()

    def decide(self, node: Node) -> Tensor:
        """Return a layer's integers, between two whole numbers until `hard`."""
        _, low, v, levels = self.weights[node]
        up = (soften(v) >= 0.5).to(low.dtype) if self.hard else soften(v)
        return (low + up).clamp(levels.q_min, levels.q_max)

    def _round(self, node: Node, x: Tensor, generator: torch.Generator | None, drop: float) -> Tensor:
        step, zero, q_min, q_max = node.args[1:5]
        assert isinstance(zero, int) and isinstance(q_min, int) and isinstance(q_max, int)
        scale = torch.tensor(step, dtype=torch.float32, device=x.device)
        if node in self.growth and not self.begun:
            scale = scale * self.growth[node].exp()
        units = (x / scale).clamp(q_min - zero, q_max - zero)
        rounded = (units + (units.round() - units).detach()) * scale
        if drop == 0.0:
            return rounded
        kept = torch.rand(x.shape, generator=generator, device=x.device) < drop
        return torch.where(kept, units * scale, rounded)


def reconstruct(
    folded: GraphModule,
    converted: GraphModule,
    batches: Batches,
    scheme: IntegerScheme,
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> GraphModule:
    """Return a converted graph whose blocks' roundings are learned one block after the other; weights' scales stay."""
    converted = copy_graph(converted)
    blocks = find_blocks(folded, converted)
    gradients = measure_gradients(folded, [block.target for block in blocks], batches, seed=seed)
    quantized, floats = Replay(converted, batches), Replay(folded, batches)
    exact: list[Tensor] = []
    reached: Node | None = None
    for block in track(blocks, "Reconstructing blocks"):
        with torch.no_grad():
            quantized.run_past(block.entry)
            given = [_unpack(block.entry, q) for q in quantized.read_all(block.entry)]
            if block.source is not reached:
                floats.run_past(block.source)
                exact = floats.read_all(block.source)
            floats.run_past(block.target)
            wanted, reached = floats.read_all(block.target), block.target
        learner = _start(folded, converted, quantized, block, scheme)
        weigh = gradients.get(block.target, torch.ones(()))
        before = _measure(learner, given, wanted, weigh)
        learner.begun = False
        with torch.inference_mode(False), torch.enable_grad():
            _learn(learner, (given, exact, wanted), weigh, max(before, 1e-12), steps, seed)
        learner.hard = True
        if _measure(learner, given, wanted, weigh) < before:
            _write(converted, learner)
        exact = wanted
    return converted


def _start(folded: GraphModule, converted: GraphModule, replay: Replay, block: Block, scheme: IntegerScheme) -> Learner:
    originals = find_layers(folded, UNFOLDED)
    weights = {}
    for name, node in find_layers(converted, UNFOLDED).items():
        if node in block.nodes and is_integer(node):
            found = read_weight(converted, node)
            exact = read_attribute(folded, str(originals[name].args[1].target)).float()  # type: ignore[union-attr]
            low, v = start_rounding(found.integers, exact / found.scale.view(-1, *[1] * (exact.ndim - 1)), WAY)
            weights[node] = found, low, v.requires_grad_(True), read_levels(node)
    moving = [node for node in block.nodes if str(node.target) == QUANTIZE and _may_move(node, scheme)]
    growth = {node: torch.zeros((), requires_grad=True) for node in moving}
    shifts = {node: torch.zeros_like(held[0].scale, requires_grad=True) for node, held in weights.items()}
    return Learner(replay, block, weights, growth, shifts)


def _may_move(node: Node, scheme: IntegerScheme) -> bool:
    """Say if a tensor has a coarse grid of its own, so that its step may be learned."""
    q_min, q_max = node.args[3:5]
    assert isinstance(q_min, int) and isinstance(q_max, int)
    tied = {*scheme.inherited, *scheme.shared}
    near = [node.args[0], *(reader for user in node.users for reader in user.users)]
    return q_max - q_min < 255 and not any(isinstance(n, Node) and name_operator(n) in tied for n in near)


def _unpack(node: Node, q: Tensor) -> Tensor:
    scale, zero = node.args[1:3]
    assert isinstance(scale, float) and isinstance(zero, int)
    return (q.float() - zero) * torch.tensor(scale, dtype=torch.float32)


def _learn(
    learner: Learner,
    data: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    weigh: Tensor,
    unit: float,
    steps: int,
    seed: int,
) -> None:
    given, exact, wanted = data
    device = given[0].device
    generator = torch.Generator(device=device).manual_seed(seed)
    rounding = [v for _, _, v, _ in learner.weights.values()]
    optimizer = torch.optim.Adam(
        [
            {"params": rounding, "lr": choose_rate(steps)},
            {"params": list(learner.growth.values()), "lr": GROWTH_RATE},
            {"params": list(learner.shifts.values()), "lr": BIAS_TRAVEL / max(steps, 1)},
        ]
    )
    for step in range(steps):
        i = int(torch.randint(len(given), (), generator=generator, device=device))
        pick = torch.randperm(len(given[i]), generator=generator, device=device)[:BATCH]
        x, y, target = given[i][pick], exact[i][pick], wanted[i][pick]
        drop = DROP * (1 - step / steps)
        x = torch.where(torch.rand(x.shape, generator=generator, device=device) < drop, y, x)
        error = ((learner.run(x, generator, drop) - target).square() * weigh).mean() / unit
        doubt = torch.stack([measure_doubt(v, step / steps) for v in rounding]).mean()
        optimizer.zero_grad()
        (error + doubt).backward()
        optimizer.step()


@torch.no_grad()
def _measure(learner: Learner, given: Sequence[Tensor], wanted: Sequence[Tensor], weigh: Tensor) -> float:
    errors = [
        float(((learner.run(x) - y).square() * weigh).sum(dtype=torch.float64))
        for x, y in zip(given, wanted, strict=True)
    ]
    return sum(errors) / sum(y.numel() for y in wanted)


@torch.no_grad()
def _write(converted: GraphModule, learner: Learner) -> None:
    """Write what was learned: integers, and the steps of tensors with the biases that hang on them."""
    for node, (weight, _, _, _) in learner.weights.items():
        write_weight(converted, node, replace(weight, integers=learner.decide(node), bias=learner.shift(node)))
    for node, growth in learner.growth.items():
        scale = float(torch.tensor(node.args[1], dtype=torch.float32) * growth.exp())
        readers = [reader for user in node.users for reader in user.users]
        layers = [r for r in readers if name_operator(r) in UNFOLDED and is_integer(r)]
        held = [(layer, read_weight(converted, layer)) for layer in layers]
        for changed in (node, *node.users):
            changed.update_arg(1, scale)
        for layer, weight in held:
            write_weight(converted, layer, replace(weight, input_scale=scale))
    converted.recompile()
