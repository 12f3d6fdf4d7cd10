"""An exported program as a module that holds its own tensors."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def inline_tensors(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return the program's own graph, which it is done with, as a module that reads its tensors by `get_attr` nodes.

    `program.module()` gives the same: it copies the graph twice and generates its code three times on the way, a tenth
    of all tracing. It is left the programs that write into buffers or hold more than tensors.
    """
    signature = program.graph_signature
    kinds = {spec.kind for spec in signature.input_specs} - {InputKind.USER_INPUT}
    if not kinds.issubset(_HELD) or any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        return _leave_to_torch(program)
    module: fx.GraphModule = program.graph_module
    graph = module.graph
    tensors = {**program.constants, **program.state_dict}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for spec, placeholder in zip(signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        tensor = tensors[spec.target]
        if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            tensor = tensor.detach()
        hold_tensor(module, spec.target, tensor, is_saved=spec.persistent is not False)
        with graph.inserting_after(placeholder):
            reader = graph.get_attr(spec.target)
        reader.meta = placeholder.meta
        placeholder.replace_all_uses_with(reader)
        graph.erase_node(placeholder)
    _keep_names(graph)
    return module


def _keep_names(graph: fx.Graph) -> None:
    """Rename nodes whose names a copy of the graph would change, as `input`, a word of Python's own.

    torch.export sets such names past the graph's own rules. A node of a pruned copy is found by its name.
    """
    rules = fx.graph._Namespace()
    for node in graph.nodes:
        if rules.create_name(node.name, None) != node.name:
            node.name = graph._graph_namespace.create_name(node.name, node)


def _leave_to_torch(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module._forward_pre_hooks.clear()  # they check the nesting of the inputs, which are to be flat
    return module


def hold_tensor(root: nn.Module, name: str, tensor: Tensor, *, is_saved: bool = True) -> None:
    """Put a parameter or buffer under its dotted name; `is_saved` says whether a state dict holds it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=is_saved)
