"""MACs, parameters and activation memory of a traced graph, by formula, for one sample.

One MAC is one multiplication with its addition, in convolutions, matrix products and attention. By convention
everything else (elementwise, normalisation, pooling, softmax, reductions, moving data) counts 0 MACs: it costs time,
but its arithmetic is small beside the products'. Operators that compute and are neither are named in `uncounted`.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from jettison.core.errors import InputError
from jettison.graph.subgraphs import list_regions, runs_graphs, walk_nodes

Size = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """One node with MACs or parameters; a parameter used twice is counted where it is used first."""

    name: str
    operator: str
    macs: int
    parameters: int


@dataclass(frozen=True)
class Profile:
    """What one sample costs.

    `parameter_bytes` is the parameters' size in their own dtypes. `peak_activation_bytes` is the largest total of
    tensors alive at once, input included, weights and the kernels' scratch space not. `uncounted` maps an operator
    that computes but has no formula to the number of its nodes: their MACs are missing from `macs`.
    """

    nodes: tuple[NodeCost, ...]
    macs: int
    parameters: int
    parameter_bytes: int
    peak_activation_bytes: int
    uncounted: Mapping[str, int]


def count(module: fx.GraphModule) -> Profile:
    """Count a flat graph of ATen operators whose nodes hold fake tensors, as torch.export makes it.

    The first dimension of the first tensor input is the batch, symbolic or not; all figures are for one sample of it.
    Other symbolic sizes take the value they had when tracing. Tensors whose size depends on values (how many boxes are
    left) are left out: their operators are named in `uncounted`. Both branches of a `torch.cond` count, as if both
    ran. Raises InputError where a node has no shape.
    """
    sizes = _Sizes(module.graph)
    seen: set[int] = set()
    nodes = []
    uncounted: Counter[str] = Counter()
    for prefix, node in walk_nodes(module):
        if node.op not in ("call_function", "call_module", "call_method"):
            continue
        name = _name(node)
        formula = FORMULAS.get(name.removeprefix("aten.").partition(".")[0]) if name.startswith("aten.") else None
        known = all(map(sizes.knows, (node, *node.all_input_nodes)))
        macs = formula(node, sizes) if formula and known else None
        if macs is None:
            if not _is_free(node) and not runs_graphs(node):
                uncounted[name] += 1
            macs = 0
        parameters = _count_parameters(module, prefix, node, seen)
        if macs or parameters:
            nodes.append(NodeCost(node.name, name, macs // sizes.divisor, parameters))
    held = list(module.parameters())
    return Profile(
        nodes=tuple(nodes),
        macs=sum(n.macs for n in nodes),
        parameters=sum(p.numel() for p in held),
        parameter_bytes=sum(p.numel() * p.element_size() for p in held),
        peak_activation_bytes=_peak_bytes(module, sizes) // sizes.divisor,
        uncounted=dict(uncounted),
    )


class _Sizes:
    """Concrete sizes of a graph's tensors: a symbolic batch is 1, other symbols have the value they were traced with.

    Where the batch is a plain number, sizes hold it, and totals are divided by `divisor`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Find the batch."""
        self.divisor = 1
        self._batch: Any = None
        tensors = [_value(n) for n in graph.nodes if n.op == "placeholder"]
        first = next((t for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 0), None)
        if first is not None:
            batch = first.shape[0]
            if isinstance(batch, torch.SymInt):
                self._batch = batch.node.expr
            else:
                self.divisor = max(1, int(batch))

    def number(self, size: int | torch.SymInt) -> int:
        """Return one size as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if self._batch is not None:
            expression = expression.subs(self._batch, 1)
        value = expression.subs(_hints(size, expression.free_symbols))
        if not value.is_number:
            raise InputError(
                f"The size {size} depends on the data, so costs cannot be counted. It stands in the traced graph. "
                f"Trace with a model whose sizes follow from its inputs' shapes."
            )
        return int(value)

    def of(self, node: Any) -> Size:
        """Return the shape of a node's tensor; raises InputError where it has none."""
        value = _value(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"Node {node!r} has no tensor in its meta['val']. Costs are read from the shapes torch.export leaves. "
                f"Pass the graph of torch.export, or run FakeTensorProp over it first."
            )
        return tuple(self.number(n) for n in value.shape)

    def bytes(self, node: fx.Node) -> int:
        """Return the bytes of all tensors a node yields."""
        return sum(
            math.prod(self.number(n) for n in t.shape) * t.element_size()
            for t in _list_tensors(node)
            if not any(map(_depends_on_values, t.shape))
        )

    def knows(self, node: fx.Node) -> bool:
        """Tell whether the sizes of a node's tensors follow from those of the inputs."""
        return not any(_depends_on_values(n) for t in _list_tensors(node) for n in t.shape)


def _list_tensors(node: fx.Node) -> list[torch.Tensor]:
    """Return all tensors a node yields."""
    value = _value(node)
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)]


def _depends_on_values(size: int | torch.SymInt) -> bool:
    if not isinstance(size, torch.SymInt):
        return False
    symbols = size.node.expr.free_symbols
    return len(_hints(size, symbols)) < len(symbols)


def _hints(size: torch.SymInt, symbols: Iterable[Any]) -> dict[Any, int]:
    """Return the values that symbols had when the graph was traced."""
    environment = size.node.shape_env
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return {s: int(values[s]) for s in symbols if s in values}


def _value(node: fx.Node) -> Any:
    """Return what the tracer recorded as the node's value."""
    return node.meta.get("val")


def _name(node: fx.Node) -> str:
    """Return an operator's name: `aten.conv2d.default`, `getitem`, or what else is called."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _argument(node: fx.Node, index: int, name: str) -> Any:
    """Return an argument given by position or by name; None where it is left out."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _convolution(node: fx.Node, sizes: _Sizes) -> int:
    """Each output element sums over the kernel and one group's inputs."""
    return math.prod(sizes.of(node)) * math.prod(sizes.of(node.args[1])[1:])


def _transposed(node: fx.Node, sizes: _Sizes) -> int:
    """Each input element is spread over the kernel and one group's outputs."""
    return math.prod(sizes.of(node.args[0])) * math.prod(sizes.of(node.args[1])[1:])


def _either_convolution(node: fx.Node, sizes: _Sizes) -> int:
    """aten.convolution says by an argument which of the two it is."""
    return (_transposed if _argument(node, 6, "transposed") else _convolution)(node, sizes)


def _product(node: fx.Node, sizes: _Sizes) -> int:
    """Each output element sums over the last dimension of the first factor."""
    return math.prod(sizes.of(node)) * sizes.of(node.args[0])[-1]


def _added_product(node: fx.Node, sizes: _Sizes) -> int:
    """As `_product`, after a first argument that is only added."""
    return math.prod(sizes.of(node)) * sizes.of(node.args[1])[-1]


def _attention(node: fx.Node, sizes: _Sizes) -> int:
    """Scores of every query with every key, then as many weighted sums of values; a mask saves nothing."""
    query, key, value = (sizes.of(a) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node, sizes: _Sizes) -> int | None:
    """Two factors: the product of all distinct indices. None for others, whose order of contraction is open."""
    equation, factors = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(factors, (list, tuple)) or len(factors) != 2:
        return None
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    extent: dict[str, int] = {}
    for term, factor in zip(terms, factors, strict=True):
        if "." in term:
            return None
        for letter, size in zip(term, sizes.of(factor), strict=True):
            extent[letter] = max(size, extent.get(letter, 1))
    return math.prod(extent.values())


def _recurrent(node: fx.Node, sizes: _Sizes) -> int | None:
    """Every step of every sequence meets each weight matrix once. None for packed sequences."""
    if not _name(node).endswith(".input"):
        return None
    x, weights = sizes.of(node.args[0]), node.args[2]
    assert isinstance(weights, (list, tuple))
    return x[0] * x[1] * _matrix_elements(weights, sizes)


def _recurrent_step(node: fx.Node, sizes: _Sizes) -> int:
    """One step, as `_recurrent`."""
    return sizes.of(node.args[0])[0] * _matrix_elements(node.args[2:4], sizes)


def _matrix_elements(weights: Iterable[Any], sizes: _Sizes) -> int:
    """Return the elements of all matrices among a recurrent operator's weights; biases are only added."""
    return sum(math.prod(shape) for shape in map(sizes.of, weights) if len(shape) == 2)


FORMULAS: dict[str, Callable[[fx.Node, _Sizes], int | None]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "convolution": _either_convolution,
    "linear": _product,
    "mm": _product,
    "bmm": _product,
    "mv": _product,
    "dot": _product,
    "matmul": _product,
    "addmm": _added_product,
    "addmv": _added_product,
    "baddbmm": _added_product,
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "einsum": _einsum,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "lstm_cell": _recurrent_step,
    "gru_cell": _recurrent_step,
    "rnn_tanh_cell": _recurrent_step,
    "rnn_relu_cell": _recurrent_step,
}
"""ATen operator (without overload) to its MACs for the traced shapes."""

_FREE_NAMES = """
    batch_norm layer_norm group_norm instance_norm rms_norm native_batch_norm native_layer_norm native_group_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training local_response_norm normalize
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d lp_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    mean sum amax amin max min argmax argmin prod var std var_mean std_mean norm linalg_vector_norm logsumexp any all
    softmax _softmax log_softmax _log_softmax _safe_softmax glu prelu hardswish gelu silu dropout feature_dropout
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
    upsample_trilinear3d pixel_shuffle pixel_unshuffle channel_shuffle
    cat concat concatenate stack hstack vstack pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d roll flip repeat repeat_interleave tile clone copy _to_copy to type_as lift_fresh_copy
    embedding index index_select gather scatter masked_fill where one_hot meshgrid tril triu
    zeros ones full empty arange linspace eye scalar_tensor zeros_like ones_like full_like empty_like new_zeros
    new_ones new_full new_empty sym_size _assert_tensor_metadata _assert_scalar
    sym_constrain_range_for_size topk sort
"""
FREE = frozenset(name.rstrip("_") for name in _FREE_NAMES.split())
"""ATen operators (without overload or final `_`) of 0 MACs by convention; pointwise ones and views are told by tags."""

_PLAIN_CALLS = frozenset(f for f in vars(operator).values() if callable(f)) - {operator.matmul, operator.imatmul}


def _is_free(node: fx.Node) -> bool:
    """Whether a node without formula counts 0 MACs by convention."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        # Arithmetic on sizes and picking from tuples; never on tensors, which torch.export writes as ATen.
        return node.op == "call_function" and target in _PLAIN_CALLS
    if torch.Tag.pointwise in target.tags or _is_view(node):
        return True
    namespace, _, name = target._schema.name.partition("::")
    return namespace == "aten" and name.rstrip("_") in FREE


def _is_view(node: fx.Node) -> bool:
    """Whether the result lies in an argument's memory: views, in-place operators, picking from a tuple."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if schema.name in ("aten::dropout", "aten::dropout_", "aten::feature_dropout"):
        return _argument(node, 2, "train") is False
    return any(r.alias_info is not None for r in schema.returns)


def _count_parameters(module: fx.GraphModule, prefix: str, node: fx.Node, seen: set[int]) -> int:
    """Return the parameters a node reads that none before it has read."""
    total = 0
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            tensor = operator.attrgetter(f"{prefix}{source.target}")(module)
            if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel()
    return total


def _memory_owners(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield each node with the one whose memory its result lies in."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        owner[node] = owner[sources[0]] if sources and node.op == "call_function" and _is_view(node) else node
        yield node, owner[node]


def _peak_bytes(module: fx.GraphModule, sizes: _Sizes, free: tuple[str, ...] = ("get_attr", "output")) -> int:
    """Return the most bytes alive at any node: its result, and every result that it or a later node reads.

    `free` are the kinds of nodes that take none. A node that runs a graph also takes what that needs inside.
    """
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node, owner in _memory_owners(module.graph):
        last[owner] = max([last.get(owner, 0), place[node], *(place[user] for user in node.users)])
    changes = [0] * (len(place) + 1)
    for owner, end in last.items():
        if owner.op not in free:
            size = sizes.bytes(owner)
            changes[place[owner]] += size
            changes[end + 1] -= size
    inside = {
        place[node]: max(_peak_bytes(r.module, sizes, (*free, "placeholder")) for r in regions) - sizes.bytes(node)
        for node in place
        if (regions := list_regions(module, node))
    }
    peak = alive = 0
    for index, change in enumerate(changes):
        alive += change
        peak = max(peak, alive + max(0, inside.get(index, 0)))
    return peak
