"""The result as a module: the caller's own class where its source allows, else the rewritten graph; and its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import CheckpointError, FixedSize
from jettison.core.plain import read_json, write_bytes, write_json
from jettison.core.plan import Plan
from jettison.graph.groups import Graph
from jettison.graph.store import load_graph, read_tensors, save_graph
from jettison.graph.surgery import copy_tensors, list_tensors, rebuild, slice_module
from jettison.graph.trace import nest

MODULE_FORMAT = "jettison.module/1"


@dataclass(frozen=True)
class ModuleFile:
    """How to make the caller's class small again: attributes to set, and the names of all its tensors.

    Tensors come from `model.safetensors`; those the graph does not need, from `module.safetensors`.
    """

    format: str
    kind: str
    attributes: tuple[Mapping[str, Any], ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Delivered:
    """The small network as a module; `refusal` says why it is not the caller's own class, empty where it is."""

    module: nn.Module
    attributes: tuple[Mapping[str, Any], ...]
    refusal: str


def deliver(model: nn.Module, graph: Graph, plan: Plan, final: fx.GraphModule) -> Delivered:
    """Return the final tensors in the caller's own class, or in the graph where its source fixes a size."""
    return deliver_kept(model, graph, plan.kept, final)


def deliver_kept(model: nn.Module, graph: Graph, kept: Mapping[str, Iterable[int]], final: fx.GraphModule) -> Delivered:
    """Do what `deliver` does for the kept positions of named groups, `final` being the graph sliced to them.

    The two are compared on the traced inputs, bit for bit; the module is in eval mode.
    """
    nested = nest(final, graph.traced.in_spec, graph.traced.out_spec).eval()
    try:
        eager = slice_module(model, graph, graph.keeps(kept))
    except FixedSize as error:
        return Delivered(nested, (), str(error))
    copy_tensors(final, eager.module)
    eager.module.eval()
    args, kwargs = pytree.tree_unflatten(list(graph.traced.example), graph.traced.in_spec)
    with torch.no_grad():
        mine, theirs = (_find_tensors(m(*args, **kwargs)) for m in (eager.module, nested))
    if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
        return Delivered(nested, (), "The network's own class computes other bits than its graph.")
    return Delivered(eager.module, tuple(eager.attributes), "")


def _find_tensors(output: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


def save_module(delivered: Delivered, graph: Graph, final: fx.GraphModule, folder: Path) -> None:
    """Write `model.json` and `model.safetensors`, and what the caller's own class needs beside them."""
    save_graph(final, graph.traced.in_spec, graph.traced.out_spec, folder)
    tensors = list_tensors(delivered.module) if not delivered.refusal else {}
    known = final.state_dict()
    extra = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items() if n not in known}
    write_bytes(save(extra, {"format": "pt"}), folder / "module.safetensors")
    kind = type(delivered.module)
    name = "" if delivered.refusal else f"{kind.__module__}.{kind.__qualname__}"
    write_json(ModuleFile(MODULE_FORMAT, name, delivered.attributes, tuple(tensors)), folder / "module.json")


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Return the compressed module from a folder that `compress` or `Result.save` wrote.

    Without `model` it is the graph, which needs none of the caller's code. With a fresh full-size `model` of the
    original's class (weights do not matter) it is that class, made small. Both compute the same bits.
    Raises CheckpointError where the folder is corrupt or foreign, or holds no result in the caller's class.
    """
    folder = Path(folder)
    if model is None:
        return nest(*load_graph(folder)).eval()
    found = read_json(ModuleFile, folder / "module.json")
    if found.format != MODULE_FORMAT or not all(map(_is_attribute, found.attributes)):
        raise CheckpointError(
            f"{folder / 'module.json'} has the format {found.format!r}, or attributes that are none. This version "
            f"reads {MODULE_FORMAT!r}. Load it with the one that wrote it, or call load(folder) without a model."
        )
    if not found.kind:
        raise CheckpointError(
            f"{folder} holds no result in the network's own class: its source fixes a size (the record's notes say "
            "which). Call load(folder) without a model."
        )
    tensors = read_tensors(folder / "model.safetensors") | read_tensors(folder / "module.safetensors")
    missing = [name for name in found.tensors if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the module, first {missing[0]!r}.")
    chosen = {name: tensors[name] for name in found.tensors}
    return rebuild(model, chosen, [dict(a) for a in found.attributes]).eval()


def _is_attribute(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry of `attributes` names a module, a name in it, and an integer or several."""
    value = entry.get("value")
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(entry.get(k), str) for k in ("module", "name")) and all(isinstance(v, int) for v in parts)
