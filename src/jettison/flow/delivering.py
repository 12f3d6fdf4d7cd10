"""The result as a module: the caller's own class where its source allows, else the rewritten graph; and its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save
from torch import Tensor, fx, nn

from jettison.core.errors import CheckpointError, FixedSize, InputError
from jettison.core.plain import read_json, write_bytes, write_json
from jettison.core.plan import Plan
from jettison.graph.comparing import list_tensors
from jettison.graph.groups import Graph
from jettison.graph.store import describe_graph, load_graph, read_tensors, restore_graph, save_graph
from jettison.graph.surgery import rebuild, slice_module
from jettison.graph.trace import nest
from jettison.graph.trainable import TrainableGraph, make_trainable

MODULE_FORMAT = "jettison.module/1"
ASKED_FOR = "It was asked for."
ResultKind = Literal["auto", "eager", "graph"]


@dataclass(frozen=True)
class ModuleFile:
    """How to make the caller's class small again: attributes to set, and the names of all its tensors.

    Tensors come from `model.safetensors`; those the graph does not need, from `module.safetensors`. `parts` are the
    submodules that are graphs, each as `describe_graph` describes it.
    """

    format: str
    kind: str
    attributes: tuple[Mapping[str, Any], ...]
    tensors: tuple[str, ...]
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Delivered:
    """The small network as a module; `refusal` says why it is not the caller's own class, empty where it is.

    `replaced` names the submodules of the caller's class that are graphs, each with the reason.
    """

    module: nn.Module
    attributes: tuple[Mapping[str, Any], ...]
    refusal: str
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return "eager", "hybrid" or "graph"."""
        if self.refusal:
            return "graph"
        return "hybrid" if self.replaced else "eager"

    @property
    def note(self) -> str:
        """What the caller should know of the module's kind, in words; empty where it is all their own class."""
        if self.refusal:
            return f"The result is a graph module, not the network's own class. {self.refusal}"
        if not self.replaced:
            return ""
        names = [repr(path) for path in self.replaced]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return (
            f"The result has the network's own class, with graphs in the place of {', '.join(names[:5])}{more}. "
            f"{next(iter(self.replaced.values()))}"
        )


def deliver(
    model: nn.Module, graph: Graph, plan: Plan, final: fx.GraphModule, *, result: ResultKind = "auto"
) -> Delivered:
    """Return the final tensors in the caller's own class, or in the graph where its source fixes a size."""
    return deliver_kept(model, graph, plan.kept, final, result=result)


def deliver_kept(
    model: nn.Module,
    graph: Graph,
    kept: Mapping[str, Iterable[int]],
    final: fx.GraphModule,
    *,
    result: ResultKind = "auto",
) -> Delivered:
    """Do what `deliver` does for the kept positions of named groups, `final` being the graph sliced to them.

    `result` "auto" gives the caller's own class, else that class with graphs in the place of the submodules whose
    source fixes a size, else the graph; "eager" raises FixedSize instead of giving the graph; "graph" gives always the
    graph. The module is compared with the graph, in float64 where that runs (see `slice_module`), and is in eval mode.
    """
    check_kind(result)
    if result == "graph":
        return Delivered(_nest(graph, final), (), ASKED_FOR)
    try:
        eager = slice_module(model, graph, graph.keeps(kept), final)
    except FixedSize as error:
        if result == "eager":
            raise
        return Delivered(_nest(graph, final), (), str(error))
    return Delivered(eager.module.eval(), tuple(eager.attributes), "", eager.replaced)


def check_kind(result: str) -> None:
    """Refuse a kind of result that does not exist."""
    if result not in get_args(ResultKind):
        raise InputError(f"result={result!r} is none of {', '.join(map(repr, get_args(ResultKind)))}. Choose one.")


def _nest(graph: Graph, final: fx.GraphModule) -> TrainableGraph:
    return make_trainable(nest(final, graph.traced.in_spec, graph.traced.out_spec))


def save_module(delivered: Delivered, graph: Graph, final: fx.GraphModule, folder: Path) -> None:
    """Write `model.json` and `model.safetensors`, and what the caller's own class needs beside them."""
    save_graph(final, graph.traced.in_spec, graph.traced.out_spec, folder)
    tensors = list_tensors(delivered.module) if not delivered.refusal else {}
    known = final.state_dict()
    extra = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items() if n not in known}
    write_bytes(save(extra, {"format": "pt"}), folder / "module.safetensors")
    kind = type(delivered.module)
    name = "" if delivered.refusal else f"{kind.__module__}.{kind.__qualname__}"
    parts = {path: _describe_part(delivered.module.get_submodule(path)) for path in delivered.replaced}
    write_json(ModuleFile(MODULE_FORMAT, name, delivered.attributes, tuple(tensors), parts), folder / "module.json")


def _describe_part(part: nn.Module) -> dict[str, Any]:
    assert isinstance(part, fx.GraphModule)
    info = part.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return describe_graph(part, info.in_spec, info.out_spec)


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Return the compressed module from a folder that `compress` or `Result.save` wrote.

    Without `model` it is the graph, which needs none of the caller's code. With a fresh full-size `model` of the
    original's class (weights do not matter) it is that class, made small. Both compute the same but for rounding.
    Raises CheckpointError where the folder is corrupt or foreign, or holds no result in the caller's class.
    """
    folder = Path(folder)
    if model is None:
        return make_trainable(nest(*load_graph(folder)))
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
    parts = {path: _restore_part(path, data, chosen, folder) for path, data in found.parts.items()}
    return rebuild(model, chosen, [dict(a) for a in found.attributes], parts).eval()


def _restore_part(path: str, data: Any, tensors: Mapping[str, Tensor], folder: Path) -> fx.GraphModule:
    own = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
    return nest(*restore_graph(data, own, folder / "module.json"))


def _is_attribute(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry of `attributes` names a module, a name in it, and an integer or several."""
    value = entry.get("value")
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(entry.get(k), str) for k in ("module", "name")) and all(isinstance(v, int) for v in parts)
