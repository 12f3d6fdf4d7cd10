"""The plumbing of static quantization: fold, observe, choose scales, convert, and write new integers into a layer.

What makes the integers better is in the files of the ladder; they all start from what `convert` gives.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.core.errors import CalibrationError, NonFiniteError, TraceError
from jettison.graph.subgraphs import count_branch_levels, list_regions, list_tensors_used
from jettison.graph.trace import source_line
from jettison.progress import track
from jettison.quantization.bits import read_levels
from jettison.quantization.clamps import drop_covered, hoist_clamps, merge_clamps
from jettison.quantization.constants import fold_constants
from jettison.quantization.fold import (
    FOLDABLE,
    copy_graph,
    find_layers,
    fold_batch_norm,
    keep_picture_axes,
    name_operator,
    read_attribute,
    set_buffer,
    unshare,
)
from jettison.quantization.padding import merge_padding
from jettison.quantization.products import write_linear
from jettison.quantization.ranges import Ranger, choose_weight_scale
from jettison.targets.integer import IntegerScheme, Levels, fake_quantize, quantize_operator

AT_ONCE = 2**22
"""Numbers of one activation that are held at a time while ranges are collected."""
BIAS_LIMIT = 2**30
"""A bias may take half of int32, so that the sum it is added to has the other half."""


@dataclass(frozen=True)
class Site:
    """A layer with weights and the bits it computes with: 8 or 7 where integer, 32 where left in float."""

    layer: str
    bits: int


@dataclass(frozen=True)
class Quantized:
    """A converted graph, which computes on the CPU what the integer runtime computes, and its layers."""

    module: GraphModule
    sites: tuple[Site, ...]
    note: str = ""
    """What must be said with the result: that no kernel here runs these bits, for one."""

    def save(self, folder: Path | str) -> Path:
        """Write structure, integers, scales and zero points into `folder`; `load_quantized` gives them back.

        Two files, `quantized.json` and `quantized.safetensors`, no pickle; returns the folder. Raises ExportError for
        a graph that cannot be written as data, StorageError where a file cannot be written.
        """
        from jettison.quantization.storing import save_quantized

        return save_quantized(self, Path(folder))


def convert(
    folded: GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    scheme: IntegerScheme,
    exclude: Collection[str] = (),
    ranger: Ranger,
    weights: str = "per_channel",
) -> GraphModule:
    """Return the integer form of a folded graph, every weight rounded to nearest; `folded` is left alone."""
    operators = frozenset(scheme.weighted)
    copied = copy_graph(folded, share=True)
    layers = find_layers(copied, operators)
    names = {node.name: tuple(str(a.target) for a in node.args[1:3] if isinstance(a, Node)) for node in layers.values()}
    with quiet_torchao(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from jettison.quantization.annotate import SchemeQuantizer

        # PT2E folds what BatchNorms we left, even where others read the convolution; and its conversion looks for those
        # of its own training with patterns it builds anew each time, which takes longer than all else.
        _exchange(copied, torch.ops.aten.batch_norm.default, _normalise)
        prepared = prepare_pt2e(copied, SchemeQuantizer(scheme, exclude, ranger))
        _name_observers(prepared)
        rows = choose_rows(folded)
        for batch in track(batches, "Collecting ranges"):
            for part in zip(*(x.split(rows or len(x)) for x in batch), strict=True):
                prepared(*part)
        _round_weights(prepared, scheme, weights)
        converted = convert_pt2e(prepared)
        _exchange(converted, _normalise, torch.ops.aten.batch_norm.default)
    result = _tidy(converted, names)
    _own_tensors(result, folded)
    return result


def _exchange(module: GraphModule, old: object, new: Callable[..., Any]) -> None:
    """Let every call of one function be one of another, in place."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is old:
            node.target = new
    module.recompile()


def _normalise(*args: Any) -> Any:
    """Stand in for BatchNorm while it is hidden."""
    return torch.ops.aten.batch_norm.default(*args)


def _own_tensors(converted: GraphModule, folded: GraphModule) -> None:
    """Give the graph copies of what it has in common with the folded one: who trains one must not change the other."""
    held = {read_attribute(folded, name).data_ptr() for name in list_tensors_used(folded)}
    for name in list_tensors_used(converted):
        value = read_attribute(converted, name)
        if value.data_ptr() in held:
            set_buffer(converted, name, value.detach().clone())


def choose_rows(module: GraphModule) -> int | None:
    """Return how many samples run at a time so that no tensor is large; None where the batch is fixed.

    Memory that the allocator gives back and asks for again at each layer makes large batches slower than small ones.
    """
    tensors = {n: n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    free = {n: x.shape for n, x in tensors.items() if x.ndim and not isinstance(x.shape[0], int)}
    if not all(node in free for node in module.graph.nodes if node.op == "placeholder"):
        return None
    largest = max(math.prod(size for size in shape[1:] if isinstance(size, int)) for shape in free.values())
    return max(1, AT_ONCE // max(1, largest))


def list_sites(folded: GraphModule, converted: GraphModule, scheme: IntegerScheme) -> tuple[Site, ...]:
    """Return every layer with weights, in the order of the graph, and the bits it computes with."""
    operators = frozenset(scheme.weighted)
    integer = {
        name: 1 + read_levels(node).q_max.bit_length()
        for name, node in find_layers(converted, operators).items()
        if is_integer(node)
    }
    return tuple(Site(name, integer.get(name, 32)) for name in find_layers(folded, operators))


def fold(module: GraphModule, weighted: frozenset[str]) -> GraphModule:
    """Return a copy with BatchNorm folded, every weighted call owning its parameters, and none needing gradients.

    Products with a stored matrix become linear layers, and activations stand before what moves numbers.
    Raises TraceError for a branch inside a branch.
    """
    if count_branch_levels(module) > 1:
        line = next(source_line(node) for node in module.graph.nodes if len(list_regions(module, node)) > 1)
        raise TraceError(
            f"The network has a torch.cond inside a torch.cond, the outer one at {line}. Preparing it for integers "
            "loses the inner one's graphs. Write them one after the other, or quantize what stands around them."
        )
    folded = copy_graph(module)
    fold_constants(folded)
    if "aten.linear.default" in weighted:
        write_linear(folded)
    unshare(folded, weighted | FOLDABLE)
    fold_batch_norm(folded)
    merge_padding(folded)
    keep_picture_axes(folded)
    merge_clamps(folded)
    hoist_clamps(folded)
    return folded.requires_grad_(False)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Hide what torchao says at import of its missing CUDA libraries, and PT2E's own deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(ao)?\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(ao)?\.")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def refuse_bad_input(module: GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise CalibrationError without items, NonFiniteError for NaN or infinity in what the network holds."""
    if not batches or not any(x.numel() for batch in batches for x in batch):
        raise CalibrationError(
            "There are no calibration items. int8 ranges cannot be chosen without any. "
            "Give at least one batch; 256 typical inputs are a good start."
        )
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"The network's {name!r} holds NaN or infinity. It cannot be rounded to integers. "
                "Load weights from before the training diverged."
            )


def _name_observers(prepared: GraphModule) -> None:
    from jettison.quantization.annotate import RangeObserver

    for node in prepared.graph.nodes:
        if node.op == "call_module":
            observer = getattr(prepared, str(node.target))
            if isinstance(observer, RangeObserver):
                observer.where = f"the output of {node.args[0]}"


def _round_weights(prepared: GraphModule, scheme: IntegerScheme, weights: str) -> None:
    """Put each weight on its grid by division, so that PT2E's reciprocal cannot choose another integer."""

    def observe(node: object) -> tuple[object, Node] | None:
        if isinstance(node, Node) and node.op == "call_module" and isinstance(node.args[0], Node):
            return getattr(prepared, str(node.target)), node.args[0]
        return None

    for node in prepared.graph.nodes:
        if name_operator(node) not in scheme.weighted or (observed := observe(node.args[1])) is None:
            continue
        observer, weight_node = observed
        weight = read_attribute(prepared, str(weight_node.target))
        shape = [-1 if i == observer.ch_axis else 1 for i in range(weight.ndim)]  # type: ignore[attr-defined]
        levels = Levels(observer.quant_min, observer.quant_max, True)  # type: ignore[attr-defined]
        if weights == "per_tensor":
            whole = choose_weight_scale(weight.reshape(1, -1), 0, levels)
            observer.scale = whole.expand(weight.shape[observer.ch_axis]).clone()  # type: ignore[attr-defined]
        biased = observe(node.args[2]) if len(node.args) > 2 else None
        if biased is not None:
            source, _ = observe(node.args[0]) or (None, None)
            assert source is not None
            step = source.calculate_qparams()[0]  # type: ignore[attr-defined]
            bias = read_attribute(prepared, str(biased[1].target))
            # A channel with tiny weights and a large bias: its step grows until the bias fits.
            observer.scale = torch.maximum(observer.scale, bias.abs() / (step * BIAS_LIMIT))  # type: ignore[attr-defined]
        scale = observer.scale.view(shape)  # type: ignore[attr-defined]
        rounded = fake_quantize(weight.float(), scale, 0, levels)
        set_buffer(prepared, str(weight_node.target), rounded)


def is_integer(node: Node) -> bool:
    """Say if a weighted call of a converted graph reads an integer weight."""
    weight = node.args[1]
    return isinstance(weight, Node) and "dequantize" in str(weight.target)


def _tidy(converted: GraphModule, names: Mapping[str, tuple[str, ...]]) -> GraphModule:
    """Name folded weights after their layers, divide instead of multiplying, and drop activations that ranges cover."""
    graph = converted.graph
    divide = quantize_operator()
    for node in list(graph.nodes):
        if str(node.target) == "quantized_decomposed.quantize_per_tensor.default":
            node.target = divide
            drop_covered(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if name_operator(node) == "aten.cat.default":
            _round_once(node)
    graph.eliminate_dead_code()
    _name_constants(converted, names)
    # A new GraphModule: PT2E leaves one whose .eval() raises.
    result = GraphModule(converted, graph)
    result.delete_all_unused_submodules()
    result.train(False)
    result.recompile()
    return result


def _round_once(joined: Node) -> None:
    """Let the one reader of a concatenation's rounding read the concatenation, where that rounding changes nothing.

    All that is joined stands on the very grid it would be rounded to. OpenVINO 2026.4 dies of two roundings in a row
    after a concatenation, and ONNX Runtime makes one of them with a scale of its own.
    """
    (rounding,) = joined.users if len(joined.users) == 1 else (joined,)
    grid = rounding.args[1:]
    parts = [part for part in joined.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    if not _rounds(rounding) or not all("dequantize" in str(p.target) and p.args[1:] == grid for p in parts):
        return
    readers = [reader for restored in rounding.users for reader in restored.users]
    if len(readers) == 1 and _rounds(readers[0]):
        readers[0].update_arg(0, joined)


def _rounds(node: Node) -> bool:
    return node.target is quantize_operator()


def _name_constants(converted: GraphModule, names: Mapping[str, tuple[str, ...]]) -> None:
    """Rename `_frozen_param7` and its scale to the dotted names of the parameters they come from."""
    for node in list(converted.graph.nodes):
        for parameter, constant in zip(names.get(node.name, ()), node.args[1:3], strict=False):
            if not (isinstance(constant, Node) and str(constant.target).endswith("dequantize_per_channel.default")):
                continue
            for index, suffix in enumerate(("", "_scale", "_zero_point")):
                source = constant.args[index]
                assert isinstance(source, Node)
                value = read_attribute(converted, str(source.target)).detach().clone()
                set_buffer(converted, parameter + suffix, value)
                with converted.graph.inserting_before(constant):
                    constant.update_arg(index, converted.graph.get_attr(parameter + suffix))
    converted.graph.eliminate_dead_code()
