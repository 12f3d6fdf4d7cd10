"""A graph as a module to live with: it trains, copies whole, and can stand in the place of a submodule."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from jettison.graph.subgraphs import list_regions

PLAIN = (bool, int, float, str, type(None))
"""What is copied from a module that a graph replaces, beside its tensors."""


class TrainableGraph(fx.GraphModule):
    """A graph whose batch norms, dropouts and recurrent layers follow `train()` and `eval()`.

    A graph is traced in eval mode: a dropout that left no operator in it stays away.
    """

    def train(self, mode: bool = True) -> TrainableGraph:
        """Set the mode of every operator that was traced with one."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, fx.GraphModule):
                _set_mode(module, mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableGraph:
        """Copy what no operator reads as well: counters, attributes."""
        new = super().__deepcopy__(memo)
        assert isinstance(new, TrainableGraph)
        for name, value in vars(self).items():
            if name not in ("_graph", "_code"):
                vars(new)[name] = copy.deepcopy(value, memo)
        return new


def make_trainable(nested: fx.GraphModule) -> TrainableGraph:
    """Return the graph, traced in eval mode, as one that can be trained; tensors are shared."""
    made = TrainableGraph(nested, copy.deepcopy(nested.graph))
    for name in {r.name for n in made.graph.nodes for r in list_regions(made, n)}:
        setattr(made, name, copy.deepcopy(getattr(nested, name)))  # its mode is not the other's
    return made.eval()


def _set_mode(module: fx.GraphModule, mode: bool) -> None:
    changed = False
    for node in module.graph.nodes:
        index = _find_mode(node)
        if index is not None and node.meta.setdefault("follows_mode", not node.args[index]):
            changed |= node.args[index] is not mode
            node.update_arg(index, mode)
    if changed:
        module.recompile()


def _find_mode(node: fx.Node) -> int | None:
    """Return which argument of an operator tells it that the network is in train mode."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.name in ("training", "train") and index < len(node.args):
            return index
    return None


def install_part(module: nn.Module, path: str, part: fx.GraphModule) -> None:
    """Put a part in the place of a submodule of `module`, whose tensors and plain attributes it takes over."""
    old = module.get_submodule(path)
    root = _mirror(old)
    for name, constant in part.named_buffers():
        if name.startswith("constant_"):
            root.register_buffer(name, constant, persistent=False)
    for name, inner in part.named_children():
        if name.startswith("constant_"):
            root.add_module(name, copy.deepcopy(inner))  # its mode is not the other's
    graph = copy.deepcopy(part.graph)
    new = TrainableGraph(root, graph, class_name="Part")
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(new)[kind] = vars(root)[kind]
    for name, value in vars(root).items():
        vars(new).setdefault(name, value)
    new.eval().train(old.training)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _mirror(module: nn.Module) -> nn.Module:
    """Return bare modules that hold the tensors and the plain attributes of `module` under the same names."""
    bare = nn.Module()
    for kind in ("_parameters", "_buffers"):
        vars(bare)[kind].update(vars(module)[kind])
    bare._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, value in vars(module).items():
        if name not in vars(bare) and (isinstance(value, PLAIN) or _is_plain_tuple(value)):
            vars(bare)[name] = value
    bare.training = module.training
    for name, child in module._modules.items():
        bare._modules[name] = None if child is None else _mirror(child)
    return bare


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, PLAIN) for v in value)
