"""Sixteen-bit weights: stored in half the space, computed with in float32; and where fp16 would overflow.

What is stored is exact arithmetic for every runtime: a cast that folds into the weights when the file is loaded. What a
runtime computes in sixteen bits is its own affair: OpenVINO takes `precision="bf16"` when it loads any file, ONNX
Runtime's CPU provider has no such kernels and casts back and forth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from jettison.core.errors import InputError, NonFiniteError, UnknownName
from jettison.graph.subgraphs import list_tensors_used
from jettison.quantization.constants import fold_constants
from jettison.quantization.convert import Quantized, Site
from jettison.quantization.fold import copy_graph, find_layers, read_attribute, set_buffer
from jettison.quantization.switches import WEIGHTED
from jettison.quantization.weight_only import finish

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Overflow:
    """A tensor with a value that a sixteen-bit type cannot hold: its layer or operator, and the largest size seen."""

    where: str
    value: float


def find_overflows(
    module: GraphModule, batches: Sequence[tuple[Tensor, ...]], *, dtype: str = "fp16"
) -> tuple[Overflow, ...]:
    """Return the weights and activations of a flat graph that leave `dtype`'s range, in the order of the graph.

    Activations are those of `batches`; without batches only weights are looked at. fp16 ends at 65504, bf16 where
    float32 does. Raises UnknownName for another type.
    """
    most = torch.finfo(_find_dtype(dtype)).max
    found: dict[str, float] = {}
    for name in list_tensors_used(module):
        _note(found, name, read_attribute(module, name), most)
    layers = {node: f"{name} output" for name, node in find_layers(module, WEIGHTED).items()}
    with torch.no_grad():
        for batch in batches:
            _Watch(module, layers, found, most).run(*batch)
    return tuple(Overflow(where, value) for where, value in found.items())


def store_half(module: GraphModule, *, dtype: str, exclude: Collection[str] = ()) -> Quantized:
    """Return a copy of a flat graph whose weights are stored as `dtype` ("fp16", "bf16") and cast to float32 when used.

    Every float32 parameter of two dimensions or more is stored so; norms and biases, which are small and sensitive, and
    the layers named in `exclude` stay float32. Raises NonFiniteError naming the layer and value that would overflow,
    UnknownName for an unknown type or layer.
    """
    kind = _find_dtype(dtype)
    copied = copy_graph(module).requires_grad_(False)
    fold_constants(copied)
    layers = find_layers(copied, WEIGHTED)
    for name in exclude:
        if name not in layers:
            raise UnknownName("layer with weights", name, layers)
    kept = {f"{name}.weight" for name in exclude}
    done: set[str] = set()
    tensors = set(list_tensors_used(copied))
    for node in list(copied.graph.nodes):
        if node.op != "get_attr" or str(node.target) in kept or str(node.target) not in tensors:
            continue
        value = read_attribute(copied, str(node.target))
        if value.dim() < 2 or value.dtype not in (torch.float32, kind):
            continue
        if str(node.target) not in done:
            set_buffer(copied, str(node.target), _round(value.detach(), kind, str(node.target)))
            done.add(str(node.target))
        with copied.graph.inserting_after(node):
            cast = copied.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    finish(copied)
    sites = tuple(Site(name, 16 if f"{name.split('@')[0]}.weight" in done else 32) for name in layers)
    return Quantized(copied, sites, f"Weights are stored as {dtype} and computed with in float32.")


def _round(value: Tensor, kind: torch.dtype, name: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"The network's {name!r} holds NaN or infinity. Load weights from before it diverged.")
    rounded = value.to(kind)
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(
            f"The network's {name!r} holds {float(value.abs().max()):.6g}, more than {kind} can: "
            f"{torch.finfo(kind).max:.6g}. Keep it in float32 with exclude=[{name.removesuffix('.weight')!r}], "
            f"or use bf16, which has float32's range."
        )
    return rounded


def _find_dtype(dtype: str) -> torch.dtype:
    if dtype not in HALVES:
        raise UnknownName("sixteen-bit type", dtype, HALVES)
    return HALVES[dtype]


def _note(found: dict[str, float], where: str, value: object, most: float) -> None:
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        size = float(value.detach().abs().max())
        if not size <= most:
            found[where] = max(size, found.get(where, 0.0))


class _Watch(Interpreter):
    """Runs a graph and notes what is too large."""

    def __init__(self, module: GraphModule, layers: dict[Node, str], found: dict[str, float], most: float) -> None:
        super().__init__(module)
        self.layers, self.found, self.most = layers, found, most

    def run_node(self, n: Node) -> Any:
        """Run one node and look at what it gives."""
        result = super().run_node(n)
        if n.op == "call_function":
            _note(self.found, self.layers.get(n, f"{n.name} output"), result, self.most)
        return result


def refuse_overflow(overflows: Sequence[Overflow], dtype: str) -> None:
    """Raise InputError that names the first tensor which `dtype` cannot hold, and how many there are."""
    if overflows:
        first = overflows[0]
        raise InputError(
            f"{first.where} reaches {first.value:.6g}, more than {dtype} can hold; so do {len(overflows) - 1} others. "
            "Computing in this type would give infinity there. Compute in bf16 or float32."
        )
