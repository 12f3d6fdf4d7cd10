"""Compare a module with the graph of the same network: on the example inputs, in float64 wherever the graph allows."""

from __future__ import annotations

import contextlib
import copy
import math
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
from jettison.graph.trace import Batch, Reader, Traced, find_attribute, get_tensor, run_nodes

EAGER_TOLERANCE = 1e-10
"""Largest relative difference in float64 between the eager and the graph result: the same sums, in the same order."""
EAGER_TOLERANCE_OWN_TYPE = 1e-4
"""The same where the graph holds constants of its own type and so runs in that only; float32 rounds at 6e-8 per sum."""
Shapes = dict[str, Any]
"""The shape of what each node yields by its name, or a list of shapes where it yields several tensors."""

_ADVICE = "A number computed from a size (a scale, a loop count) is the usual reason; or take the graph result."


@dataclass(frozen=True)
class Proof:
    """What the sliced graph gives for `inputs`, which are float64 where it `is_double`.

    `varied` are tensors to run with instead of the network's own: those that hold one value throughout (zeros, ones)
    get others, lest a zero hide a mistake.
    """

    inputs: Batch
    outputs: list[Tensor]
    is_double: bool
    varied: dict[str, Tensor]


def list_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those a state_dict leaves out as well; tied ones under each name."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named.items()}


def copy_module(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a deep copy; a network that cannot be copied raises FixedSize.

    `instead` maps the identity of a tensor to the one that takes its place in the copy, which is then not copied.
    """
    try:
        return copy.deepcopy(model, dict(instead or {}))
    except Exception as error:
        raise FixedSize(
            f"The network cannot be copied: {error}. It was tried with copy.deepcopy on {type(model).__name__}. "
            "Take the graph result, which needs no copy of the module."
        ) from error


def replace_each(model: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Say for `copy_module` what `make` gives for each parameter and buffer of `model`; those of own types are left."""
    made: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) is nn.Parameter:
            made[id(tensor)] = nn.Parameter(make(tensor.detach()), requires_grad=tensor.requires_grad)
        elif type(tensor) is Tensor:
            made[id(tensor)] = make(tensor.detach())
    return made


def copy_shadow(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device: it has sizes and computes nothing."""

    def empty(value: Tensor) -> Tensor:
        return torch.empty_like(value, device="meta")

    copied = copy_module(model, replace_each(model, empty))
    for inner in copied.modules():
        vars(inner).update({n: empty(v) for n, v in vars(inner).items() if isinstance(v, Tensor)})
    return copied


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


def run_sliced(model: nn.Module, sliced: fx.GraphModule, inputs: Batch) -> Proof:
    """Run the sliced graph of `model` in float64; where a type is written into the graph, in its own."""
    try:
        return run_wide(model, sliced, inputs)[0]
    except RuntimeError:
        return Proof(inputs, _run_nodes(sliced, inputs, find_attribute)[0], False, {})


def run_wide(model: nn.Module, sliced: fx.GraphModule, inputs: Batch) -> tuple[Proof, Shapes]:
    """Run the sliced graph of `model` in float64; returns the shapes of what every node yields as well."""
    varied = vary_constants(model, sliced)
    wide = {id(get_tensor(sliced, name)): value for name, value in varied.items()}

    def read(owner: nn.Module, name: str) -> Any:
        value = find_attribute(owner, name)
        if not isinstance(value, Tensor):
            return value
        return wide.get(id(value), value.double() if value.is_floating_point() else value)

    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    outputs, shapes = _run_nodes(sliced, inputs, read)
    return Proof(inputs, outputs, True, varied), shapes


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
        if value.is_floating_point() and value.numel() and _is_constant(value.flatten()):
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            varied |= {name: value.double() + 0.1 * noise.to(value.device) for name in same}
    return varied


def _is_constant(values: Tensor) -> bool:
    """Tell whether all values are one; most weights show with the first few that they are not."""
    return bool((values[:16] == values[0]).all()) and bool((values == values[0]).all())


def prepare(module: nn.Module, proof: Proof) -> nn.Module:
    """Return a copy of `module`, or of the graph, that runs as `proof` was computed."""
    if not proof.is_double:
        return copy_module(module)
    copied = copy_module(module, replace_each(module, _widen))
    place_tensors(_to_double(copied), proof.varied)
    return copied


def verify(result: nn.Module, traced: Traced, proof: Proof, *, fused: bool = False) -> None:
    """Compare the eager result with the graph result; raises FixedSize where they differ.

    With `fused` it runs as the caller will: with torch's fused transformer kernels, where they apply.
    """
    found = run_eager(result, traced, proof, contextlib.nullcontext(), fused=fused)
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


def run_eager(
    result: nn.Module,
    traced: Traced,
    proof: Proof,
    mode: contextlib.AbstractContextManager[Any],
    *,
    fused: bool = False,
) -> list[Tensor]:
    """Run a copy of the eager result under `mode` on the inputs of `proof`; returns its tensors."""
    module, journal = prepare(result, proof), Journal()
    args, kwargs = pytree.tree_unflatten(list(proof.inputs), traced.in_spec)
    # The fused kernels stand back from modules with hooks.
    with contextlib.nullcontext() if fused else _watched_plain(module, journal):
        value = run_watched(mode, module, args, kwargs, journal)
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def tolerance_of(proof: Proof) -> float:
    """Return the largest relative difference that rounding explains."""
    return EAGER_TOLERANCE if proof.is_double else EAGER_TOLERANCE_OWN_TYPE


def measure_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of tensors of equal shapes, relative to 1 + the largest that is expected.

    It is NaN where any difference is.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    scale = 1 + max((float(b.abs().max()) for _, b in pairs), default=0.0)
    differences = [float((a - b).abs().max()) for a, b in pairs]
    # max() of Python would pass over a NaN that is not the first.
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0) / scale


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


def _run_nodes(module: fx.GraphModule, inputs: Batch, read: Reader) -> tuple[list[Tensor], Shapes]:
    shapes: Shapes = {}
    outputs: list[Tensor] = []
    with torch.no_grad():
        for node, value, _ in run_nodes(module, inputs, read):
            if node.op == "output":
                outputs = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            elif isinstance(value, (tuple, list)):
                shapes[node.name] = [tuple(v.shape) if isinstance(v, Tensor) else () for v in value]
            elif isinstance(value, Tensor):
                shapes[node.name] = tuple(value.shape)
    return outputs, shapes


def _widen(value: Tensor) -> Tensor:
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()


def _to_double(module: nn.Module) -> nn.Module:
    """Turn parameters, buffers and plain tensor attributes to float64, in place."""
    module.double()
    for inner in module.modules():
        for name, value in list(vars(inner).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(inner)[name] = value.double()
    return module


__all__ = ["Misfit", "Proof", "copy_module", "list_tensors", "place_tensors", "prepare", "run_sliced", "verify"]
