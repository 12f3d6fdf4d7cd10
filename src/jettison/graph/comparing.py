"""Compare a module with the graph of the same network: on the example inputs, in float64 wherever the graph allows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import FixedSize
from jettison.graph.matching import run_watched
from jettison.graph.provenance import Journal, Misfit
from jettison.graph.state import plain_attention
from jettison.graph.trace import Batch, Traced, get_tensor, run_nodes

EAGER_TOLERANCE = 1e-10
"""Largest relative difference in float64 between the eager and the graph result: the same sums, in the same order."""
EAGER_TOLERANCE_OWN_TYPE = 1e-4
"""The same where the graph holds constants of its own type and so runs in that only; float32 rounds at 6e-8 per sum."""
_ADVICE = "A number computed from a size (a scale, a loop count) is the usual reason; or take the graph result."


@dataclass(frozen=True)
class Proof:
    """What the sliced graph gives: its outputs and the shapes of every node's output.

    `varied` are tensors to run with instead of the network's own: those that hold one value throughout (zeros, ones)
    get others, lest a zero hide a mistake.
    """

    outputs: list[Tensor]
    shapes: dict[str, Any]
    is_double: bool
    varied: dict[str, Tensor]


def list_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those a state_dict leaves out as well; tied ones under each name."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named.items()}


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy; a network that cannot be copied raises FixedSize."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise FixedSize(
            f"The network cannot be copied: {error}. It was tried with copy.deepcopy on {type(model).__name__}. "
            "Take the graph result, which needs no copy of the module."
        ) from error


def place_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers new values of any shape; the objects stay, so that tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        old = get_tensor(model, name)
        if not old.is_meta:
            old.grad = None
            old.data = tensor.detach().clone()
            continue
        path, _, leaf = name.rpartition(".")
        value = tensor.detach().clone()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(model.get_submodule(path), leaf, made.setdefault(id(old), value))


def run_sliced(model: nn.Module, sliced: fx.GraphModule, traced: Traced) -> Proof:
    """Run the sliced graph of `model` in float64; where a type is written into the graph, in its own."""
    varied = vary_constants(model, sliced)
    wide = _to_double(copy.deepcopy(sliced))
    assert isinstance(wide, fx.GraphModule)
    place_tensors(wide, varied)
    try:
        return _run_nodes(wide, _widen(traced.example), True, varied)
    except RuntimeError:
        return _run_nodes(sliced, traced.example, False, {})


def vary_constants(model: nn.Module, given: nn.Module) -> dict[str, Tensor]:
    """Give parameters of `model` that hold one value throughout in `given` others, by name."""
    generator = torch.Generator().manual_seed(0)
    tensors = list_tensors(given)
    names: dict[int, list[str]] = {}  # a tied parameter has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tensors:
            names.setdefault(id(parameter), []).append(name)
    varied: dict[str, Tensor] = {}
    for same in names.values():
        value = tensors[same[0]]
        if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            varied |= {name: value.double() + 0.1 * noise.to(value.device) for name in same}
    return varied


def prepare(module: nn.Module, traced: Traced, proof: Proof) -> tuple[nn.Module, Batch]:
    """Return a copy of `module`, or of the graph, and the example inputs as `proof` was computed with them."""
    module, inputs = copy_module(module), traced.example
    if proof.is_double:
        module, inputs = _to_double(module), _widen(inputs)
        place_tensors(module, proof.varied)
    return module, inputs


def verify(result: nn.Module, traced: Traced, proof: Proof, *, fused: bool = False) -> None:
    """Compare the eager result with the graph result; raises FixedSize where they differ.

    With `fused` it runs as the caller will: with torch's fused transformer kernels, where they apply.
    """
    module, inputs = prepare(result, traced, proof)
    args, kwargs = pytree.tree_unflatten(list(inputs), traced.in_spec)
    journal = Journal()
    # The fused kernels stand back from modules with hooks.
    with contextlib.nullcontext() if fused else _watched_plain(module, journal):
        value = run_watched(contextlib.nullcontext(), module, args, kwargs, journal)
    found = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    if [v.shape for v in found] != [v.shape for v in proof.outputs]:
        raise FixedSize(
            f"The pruned module returns {[tuple(v.shape) for v in found]}, "
            f"its graph {[tuple(v.shape) for v in proof.outputs]}. "
            f"All sizes of {type(result).__name__}'s calls were put right. {_ADVICE}"
        )
    error = measure_error(found, proof.outputs)
    if not error <= tolerance_of(proof):
        raise FixedSize(
            f"The pruned module's output differs from its graph's by {error:.2g} of the largest. "
            f"All sizes of {type(result).__name__}'s calls were put right. {_ADVICE}"
        )


def tolerance_of(proof: Proof) -> float:
    """Return the largest relative difference that rounding explains."""
    return EAGER_TOLERANCE if proof.is_double else EAGER_TOLERANCE_OWN_TYPE


def measure_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of tensors of equal shapes, relative to 1 + the largest that is expected."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    scale = 1 + max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / scale


@contextlib.contextmanager
def _watched_plain(module: nn.Module, journal: Journal) -> Iterator[None]:
    """Note which submodule runs, and keep torch's fused transformer kernels off."""
    for path, inner in module.named_modules():
        enter, leave = _note(path, journal)
        inner.register_forward_pre_hook(enter)
        inner.register_forward_hook(leave)
    with plain_attention():
        yield


def _note(path: str, journal: Journal) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: Any) -> None:
        journal.stack.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        journal.stack.pop()

    return enter, leave


def _run_nodes(module: fx.GraphModule, inputs: Batch, is_double: bool, varied: dict[str, Tensor]) -> Proof:
    shapes: dict[str, Any] = {}
    outputs: list[Tensor] = []
    with torch.no_grad():
        for node, value, _ in run_nodes(module, inputs):
            if node.op == "output":
                outputs = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            elif isinstance(value, (tuple, list)):
                shapes[node.name] = [tuple(v.shape) if isinstance(v, Tensor) else () for v in value]
            elif isinstance(value, Tensor):
                shapes[node.name] = tuple(value.shape)
    return Proof(outputs, shapes, is_double, varied)


def _widen(batch: Batch) -> Batch:
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def _to_double(module: nn.Module) -> nn.Module:
    """Turn parameters, buffers and plain tensor attributes to float64, in place."""
    module.double()
    for inner in module.modules():
        for name, value in list(vars(inner).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(inner)[name] = value.double()
    return module


__all__ = ["Misfit", "Proof", "copy_module", "list_tensors", "place_tensors", "prepare", "run_sliced", "verify"]
