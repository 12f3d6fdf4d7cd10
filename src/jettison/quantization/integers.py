"""The integer reference: runs a converted graph with whole-number sums, as an integer kernel does.

The converted graph itself computes in float32 what the integers stand for. Its sums round, so that once in some ten
thousand values a result that lies between two steps falls to the other side. Here sums are exact (int32 numbers held in
float64) and only the change of scale rounds, in float32 and half to even, as kernels do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from jettison.quantization.fold import find_weight, name_operator
from jettison.targets.integer import IntegerScheme


def run_integers(module: GraphModule, inputs: tuple[Tensor, ...], scheme: IntegerScheme) -> tuple[Tensor, ...]:
    """Return what a graph made by `quantize` gives in integer arithmetic; float parts stay float."""
    with torch.no_grad():
        outputs = _Integers(module, scheme).run(*inputs)
    return tuple(outputs)


@dataclass(frozen=True)
class _Sum:
    """Whole-number sums and what one unit of them stands for."""

    units: Tensor
    scale: Tensor

    def to_float(self) -> Tensor:
        return self.units.float() * self.scale


class _Integers(Interpreter):
    def __init__(self, module: GraphModule, scheme: IntegerScheme) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.weighted = frozenset(scheme.weighted)

    def run_node(self, n: Node) -> Any:
        """Keep sums whole from a weighted operator to the rounding after it."""
        operator = name_operator(n)
        if operator in self.weighted and _reads_integers(n):
            return self._sum(n)
        source = n.args[0] if n.args and isinstance(n.args[0], Node) else None
        held = self.env.get(source) if source is not None else None
        if operator == "jettison.quantize_per_tensor.default":
            if isinstance(held, _Sum):
                return _requantize(held.units.float() * (held.scale / _step(n)), n)
            if (
                source is not None
                and name_operator(source) == "aten.add.Tensor"
                and (whole := self._add(source, n)) is not None
            ):
                return whole
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Give float numbers to operators that know nothing of sums."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return map_aggregate(args, lambda a: a.to_float() if isinstance(a, _Sum) else a), kwargs

    def _sum(self, n: Node) -> _Sum:
        source, weight = n.args[0], n.args[1]
        assert isinstance(source, Node) and isinstance(weight, Node) and find_weight(n) is not None
        q, scale = self._integers(source)
        stored, weight_scale = weight.args[0], weight.args[1]
        bias = n.args[2] if len(n.args) > 2 else None
        args: list[Any] = [q, self._read(stored).double()]
        args.append(self._read(bias.args[0]).double() if isinstance(bias, Node) else None)
        assert callable(n.target)
        units = n.target(*args, *n.args[3:])
        step = scale * self._read(weight_scale).float()
        return _Sum(
            units, step.view(1, -1, *[1] * (units.ndim - 2)) if name_operator(n) != "aten.linear.default" else step
        )

    def _add(self, n: Node, quantizing: Node) -> Tensor | None:
        if len(n.users) != 1 or not all(isinstance(a, Node) and _is_dequantized(a) for a in n.args[:2]) or n.kwargs:
            return None
        left, right = (a for a in n.args[:2] if isinstance(a, Node))
        scales = (_step(left), _step(right), _step(quantizing))
        zero_points = (left.args[2], right.args[2], quantizing.args[2])
        assert all(isinstance(z, int) for z in zero_points)
        steps = add_as_kernel(self._read(left.args[0]), self._read(right.args[0]), scales, zero_points)
        return _saturate(steps, quantizing)

    def _integers(self, n: Node) -> tuple[Tensor, Tensor]:
        """Return the whole numbers behind a dequantization, zero point taken off, and their scale."""
        assert isinstance(n.args[2], int)
        return self._read(n.args[0]).double() - n.args[2], _step(n)

    def _read(self, node: object) -> Tensor:
        """Return what a node gave, or a stored constant."""
        assert isinstance(node, Node)
        value: Tensor = self.fetch_attr(str(node.target)) if node.op == "get_attr" else self.env[node]
        return value


def add_as_kernel(left: Tensor, right: Tensor, scales: tuple[Tensor, ...], zero_points: tuple[Any, ...]) -> Tensor:
    """Return the steps, before rounding, that the runtime's kernel for adding two integer tensors comes to.

    `scales` and `zero_points` are those of left, right and result. The kernel rounds to float32 after each fused
    multiply-add, the right tensor first; in float64 a product of two float32 numbers is exact, so that adding to it
    and rounding once is what a fused multiply-add does. Any other order falls to another side of a tie now and then.
    """
    first, second = (scales[0] / scales[2]).double(), (scales[1] / scales[2]).double()
    product = (second * zero_points[1]).float().double()
    fixed = zero_points[2] - (first * zero_points[0] + product).float()
    steps = (right.double() * second + fixed.double()).float()
    summed: Tensor = (left.double() * first + steps.double()).float()
    return summed


def _is_dequantized(node: Node) -> bool:
    return str(node.target) == "quantized_decomposed.dequantize_per_tensor.default"


def _reads_integers(n: Node) -> bool:
    weight = n.args[1]
    return (
        isinstance(n.args[0], Node)
        and _is_dequantized(n.args[0])
        and isinstance(weight, Node)
        and str(weight.target) == "quantized_decomposed.dequantize_per_channel.default"
        and all(a is None or (isinstance(a, Node) and "dequantize" in str(a.target)) for a in n.args[2:3])
    )


def _step(n: Node) -> Tensor:
    return torch.tensor(n.args[1], dtype=torch.float32)


def _requantize(steps: Tensor, n: Node) -> Tensor:
    zero_point = n.args[2]
    assert isinstance(zero_point, int)
    return _saturate(torch.round(steps) + zero_point, n)


def _saturate(steps: Tensor, n: Node) -> Tensor:
    low, high, dtype = n.args[3], n.args[4], n.args[5]
    assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
    return torch.clamp(torch.round(steps), low, high).to(dtype)
