"""Calls of submodules in a run of the caller's module: what went in and came out, and how it was nested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jettison.graph.state import plain_attention
from jettison.graph.trace import Batch
from jettison.graph.trainable import PLAIN


@dataclass(frozen=True)
class Call:
    """One call of a submodule: what went in and came out, flat, and how it was nested."""

    inputs: list[Any]
    outputs: list[Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec


def record_calls(module: nn.Module, inputs: Batch, in_spec: pytree.TreeSpec, paths: set[str]) -> dict[str, list[Call]]:
    """Run a module and note every call of the submodules at `paths`; none where something unknown is handed over."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    open_calls: dict[str, list[tuple[list[Any], pytree.TreeSpec]]] = {path: [] for path in paths}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            open_calls[path].append(([v.clone() if isinstance(v, Tensor) else v for v in leaves], spec))

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves, spec = pytree.tree_flatten(output)
            given, in_spec = open_calls[path].pop()
            copies = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
            calls[path].append(Call(given, copies, in_spec, spec))

        return hook

    hooks = []
    for path in paths:
        hooks.append(module.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True))
        hooks.append(module.get_submodule(path).register_forward_hook(leave(path), with_kwargs=True))
    args, kwargs = pytree.tree_unflatten(list(inputs), in_spec)
    with torch.no_grad(), plain_attention():
        module.eval()(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return {p: c if all(_is_known(v) for k in c for v in (*k.inputs, *k.outputs)) else [] for p, c in calls.items()}


def _is_known(value: Any) -> bool:
    return isinstance(value, (Tensor, *PLAIN, torch.dtype, torch.device))


def list_fixed(call: Call) -> list[Any]:
    """Return what is no tensor, in its place."""
    return [None if isinstance(v, Tensor) else v for v in (*call.inputs, *call.outputs)]
