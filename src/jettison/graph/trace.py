"""From the caller's module to a flat graph of ATen operators: the one place that calls torch.export."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from jettison.core.errors import InputError, JettisonError, NonFiniteError, ShapeError, TraceError
from jettison.graph.caches import forget_caches
from jettison.graph.functional import replace_writes
from jettison.graph.inline import inline_tensors
from jettison.graph.state import eval_mode, plain_attention, same_buffers
from jettison.graph.subgraphs import (
    Context,
    choose_region,
    iterate_regions,
    list_regions,
    name_apart,
)

_LIBRARY = str(Path(torch.__file__).parent) + os.sep

Batch = tuple[Tensor, ...]
"""The flat tensor inputs of the network, in the order of the graph's placeholders."""

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_BATCH_NORM_OF_WEIGHT = torch.ops.aten._native_batch_norm_legit.no_stats
"""What a standardised weight becomes: a norm in training mode, without running statistics."""


@dataclass(frozen=True)
class Traced:
    """A network as a flat graph.

    `module` takes the flat inputs and returns a tuple of tensors; its parameters and buffers keep their
    names. `in_spec` and `out_spec` are the caller's nesting. `example` are the flat inputs it was traced with.
    Of the outputs in `free_outputs` (their numbers) the channels may be pruned.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: Batch
    dynamic_batch: bool
    input_names: tuple[str, ...]
    free_outputs: tuple[int, ...] = ()


def trace_module(model: nn.Module, inputs: Sequence[Any], kwinputs: Mapping[str, Any] | None = None) -> Traced:
    """Return `model` as a flat graph in eval mode, traced with `inputs`; the model is not changed.

    The first dimension of every input is taken as the batch and left free; where the network fixes it, the
    graph is made for that batch only and `dynamic_batch` is False. Raises ShapeError where the network does
    not take the inputs, NonFiniteError where weights or outputs hold NaN, TraceError where export fails.
    """
    args, kwargs = tuple(inputs), dict(kwinputs or {})
    _check_state(model)
    with eval_mode(model), same_buffers(model), plain_attention(), _quiet_export(), torch.no_grad():
        _try_forward(model, args, kwargs)
        # Export makes a new graph module in each of its passes; only the last one's code may ever run.
        with forget_caches(model, args, kwargs), _use_lazy_graph_module(True):
            program, dynamic, example_args, example_kwargs = _export(model, args, kwargs)
        if not replace_writes(program.graph_module):
            program = program.run_decompositions({})
        module = inline_tensors(program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    _flatten(module)
    flat = tuple(pytree.tree_leaves((example_args, example_kwargs)))
    if not all(isinstance(v, Tensor) for v in flat):
        raise TraceError(
            "The network takes an input that is not a tensor. Wrap it in a module that fixes that value, "
            "for example `class Fixed(nn.Module): forward = lambda self, x: net(x, flag=True)`."
        )
    names = tuple(n.name for n in module.graph.nodes if n.op == "placeholder")
    return Traced(module, in_spec, out_spec, flat, dynamic, names)


def nest(module: fx.GraphModule, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> fx.GraphModule:
    """Return a copy of a flat graph that takes and returns the caller's own nesting; tensors are shared."""
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    names = iter([n.name for n in graph.nodes if n.op == "placeholder"])
    arguments = []  # one name for each argument of the call, however many tensors it holds
    positional, keywords = in_spec.children()
    for index, spec in enumerate(positional.children()):
        held = [next(names) for _ in range(spec.num_leaves)]
        arguments.append(held[0] if spec.is_leaf() else f"nested_{index}")
    arguments += keywords.context
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, in_spec, out_spec)))
    return fx.GraphModule(module, graph)


UNKNOWN_SIZE = 1_000_003
"""Stands for a size that depends on values (how many boxes are left): a number that no other dimension has."""


def hint(size: Any) -> int:
    """Return a dimension's size as an int; a free batch gives the size it was traced with."""
    if isinstance(size, int):
        return size
    found = size.node.hint
    if found is None:
        symbols = sorted(size.node.expr.free_symbols, key=str)
        found = size.node.expr.subs({s: UNKNOWN_SIZE + 2 * i for i, s in enumerate(symbols)})
    return int(found)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the traced shape of a node's tensor, or None where it yields no single tensor."""
    value = node.meta.get("val")
    return tuple(map(hint, value.shape)) if isinstance(value, Tensor) else None


def shapes_of(node: fx.Node) -> Any:
    """Return what `shape_of` does, or for a node that yields several tensors the shapes of all."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [tuple(map(hint, v.shape)) if isinstance(v, Tensor) else () for v in value]
    return shape_of(node)


def source_line(node: fx.Node) -> str:
    """Return the user's `file:line` that made this node: the innermost frame outside torch and site-packages."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    found = ""
    for frame in frames:
        if frame.startswith('File "'):
            file, line = frame.split('"')[1], frame.split("line ")[1].split(",")[0]
            if not file.startswith(_LIBRARY) and not file.startswith("<"):
                found = f"{file}:{line}"
    return found


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of that dotted name."""
    value = find_attribute(module, name)
    assert isinstance(value, Tensor)
    return value


def find_attribute(module: nn.Module, name: str) -> Any:
    """Return what a `get_attr` node names: a parameter, a buffer, or the sub-graph of an operator that has one."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, keeping what it is (parameter, buffer, plain attribute)."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, leaf, value)


Steps = Generator[tuple[fx.Node, Any, dict[fx.Node, Any]], None, Any]


Reader = Callable[[nn.Module, str], Any]
"""Gives what a `get_attr` node of a graph module names."""


def run_nodes(module: fx.GraphModule, inputs: Batch, read: Reader = find_attribute) -> Steps:
    """Run the graph node by node; yields each call or output node with its value and the values still alive.

    A caller may replace `values[node]` before the next step, to see what follows from another value. Nodes of a
    sub-graph that runs (of `torch.cond`, say) come before the node that runs it, with values of their own.
    """
    return _run_graph(module, inputs, read, contextlib.nullcontext, is_whole=True)


def _run_graph(
    module: fx.GraphModule, inputs: Sequence[Any], read: Reader, context: Context, *, is_whole: bool
) -> Steps:
    values: dict[fx.Node, Any] = {}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for argument in node.all_input_nodes:
            last_use[argument] = node
    feed = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = read(module, str(node.target))
        elif regions := list_regions(module, node):
            region = choose_region(node, regions, values)
            operands = [values[o] if isinstance(o, fx.Node) else o for o in region.operands]
            # The caller's own work between two steps is not to run under the region's autocast.
            nested = _nest_contexts(context, region.context)
            values[node] = yield from _run_graph(region.module, operands, read, nested, is_whole=False)
            yield node, values[node], values
        else:
            with context():
                values[node] = evaluate_node(node, values)
            if node.op == "output" and not is_whole:
                return tuple(values[node]) if isinstance(values[node], (tuple, list)) else (values[node],)
            yield node, values[node], values
        for argument in node.all_input_nodes:
            if last_use[argument] is node:
                values.pop(argument, None)
    return None


def _nest_contexts(outer: Context, inner: Context) -> Context:
    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with outer(), inner():
            yield

    return both


def evaluate_node(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Compute one call or output node from the values of its arguments."""
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    if node.op == "output":
        return args[0]
    if node.op != "call_function":
        raise TraceError(f"The graph holds a {node.op} node ({node}), which jettison cannot run.")
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _check_state(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}. Pass the network itself.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if bool(torch.isfinite(tensor.sum())):
            continue  # a quick way through; large numbers may well add up to infinity
        # Masks and bounds in buffers may well be infinite.
        bad = int((~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)).sum())
        if bad:
            raise NonFiniteError(f"Weight {name!r} holds {bad} NaN or infinite values. Load sound weights first.")


def _try_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shapes = [tuple(v.shape) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"An input of shape {tuple(value.shape)} holds NaN or infinity. Clean the inputs.")
    try:
        output = model(*args, **kwargs)
    except JettisonError:
        raise
    except Exception as error:
        where = _user_frame(error)
        raise ShapeError(
            f"The network does not take inputs of shape {shapes}: {_first_line(error)}"
            f"{f' (at {where})' if where else ''}. Give inputs as you would call the network."
        ) from error
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError("The network's own output holds NaN or infinity on the given inputs.")


def _first_line(error: BaseException) -> str:
    """Return the first line of what an exception says; an assertion may say nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _user_frame(error: BaseException) -> str:
    trail, found = error.__traceback__, ""
    while trail is not None:
        file = trail.tb_frame.f_code.co_filename
        if not file.startswith(_LIBRARY) and file != __file__ and not file.startswith("<"):
            found = f"{file}:{trail.tb_lineno}"
        trail = trail.tb_next
    return found


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, bool, tuple[Any, ...], dict[str, Any]]:
    """Export with a free batch; where the network will not have it, with the batch as given."""
    # A batch of one would be taken for a constant, so it is doubled first.
    wide_args, wide_kwargs = pytree.tree_map(_double_batch, (args, kwargs))
    free = pytree.tree_map(_free_batch, (wide_args, wide_kwargs))
    shapes = {**dict(zip(_parameter_names(model, args), free[0], strict=True)), **free[1]}
    try:
        program = torch.export.export(model, wide_args, wide_kwargs, strict=False, dynamic_shapes=shapes)
        if _batch_is_free(program):
            return program, True, wide_args, wide_kwargs
    except Exception:  # noqa: BLE001 - whatever the reason, the fixed batch is tried next and reports its own
        pass
    try:
        return torch.export.export(model, args, kwargs, strict=False), False, args, kwargs
    except Exception as error:
        where = _user_frame(error)
        raise TraceError(
            f"torch.export cannot follow the network: {_first_line(error)}"
            f"{f' (at {where})' if where else ''}. Control flow that depends on tensor values must become "
            "torch.where or torch.cond; `torch.export.export(model, inputs, strict=False)` shows the whole story."
        ) from error


def _parameter_names(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """Name the positional inputs as `forward` does; export wants its shapes by name."""
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in positional[: len(args)]]
    spread = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    return names if spread is None else [*names, *(f"{spread}_{i}" for i in range(len(args) - len(names)))]


def _double_batch(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _free_batch(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() > 0 else None


def _batch_is_free(program: torch.export.ExportedProgram) -> bool:
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in _inputs(program)]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0]
    # A size that the network has settled may still be a symbol, of one value.
    return bool(sizes) and all(isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None for s in sizes)


def _inputs(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n) for n in program.graph_signature.user_inputs}


def _flatten(module: fx.GraphModule) -> None:
    """Give the graph plain inputs and outputs, BatchNorm back its one-output form, and make constants buffers."""
    module.graph.set_codegen(fx.graph.CodeGen())
    for graph_module in (*(r.module for r in iterate_regions(module)), module):
        _plain_graph(graph_module)
    name_apart(module)


def _plain_graph(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in graph.nodes:
        if node.op == "get_attr":
            _register(module, str(node.target))
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default
        if node.target in (_BATCH_NORM, _BATCH_NORM_OF_WEIGHT):
            if node.target is _BATCH_NORM:
                x, weight, bias, mean, var, momentum, eps = node.args
                args = (x, weight, bias, mean, var, False, momentum, eps, False)
            else:
                x, weight, bias, training, momentum, eps = node.args
                args = (x, weight, bias, None, None, training, momentum, eps, False)
            with graph.inserting_before(node):
                whole = graph.call_function(torch.ops.aten.batch_norm.default, args)
            whole.meta = {**node.meta, "val": node.meta["val"][0]}
            for user in list(node.users):
                assert user.target is operator.getitem and user.args[1] == 0
                user.replace_all_uses_with(whole)
                graph.erase_node(user)
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _register(module: nn.Module, name: str) -> None:
    """Make a tensor that hangs on a module as a plain attribute a buffer of it, so that it is found and saved."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    value = getattr(owner, leaf)
    if isinstance(value, Tensor) and leaf not in owner._parameters and leaf not in owner._buffers:
        delattr(owner, leaf)
        owner.register_buffer(leaf, value)


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    logger = logging.getLogger("torch.export")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch|copyreg")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        # Raised with a stack level that points outside torch: caches a module makes in its first forward.
        warnings.filterwarnings("ignore", message="The tensor attribute", category=UserWarning)
        # Likewise: what torch.export makes of a recurrent layer once it has exported one (torch 2.13).
        warnings.filterwarnings("ignore", message="_check_is_size", category=FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def numel_per_sample(node: fx.Node) -> int:
    """Return how many elements a node's tensor has for one sample of the batch."""
    shape = shape_of(node)
    return 0 if shape is None else math.prod(shape[1:])
