"""The ONNX form of each ATen operator that `onnx_direct` writes: a function and a line in FORMS.

A form takes the draft, the node and the node's arguments and returns the name of its value, or a list of names. What it
has no form for ends in NoForm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jettison.targets.onnx_direct import Draft, Kind, NoForm, to_numpy
from jettison.targets.onnx_pictures import (
    average_adaptive,
    convolve,
    cut,
    enlarge_linear,
    enlarge_nearest,
    pad,
    pad_constant,
    pool,
    transpose_convolve,
)

if TYPE_CHECKING:
    from torch.fx import Node

Form = Callable[..., Any]


def _multiply_weight(draft: Draft, node: Node, x: Any, weight: Any, bias: Any = None) -> str:
    if len(draft.kind(x).sizes) == 2 and bias is not None:
        return draft.add("Gemm", [draft.read(x), draft.read(weight), draft.read(bias)], transB=1)
    y = draft.add("MatMul", [draft.read(x), draft.add("Transpose", [draft.read(weight)], perm=[1, 0])])
    return y if bias is None else draft.add("Add", [y, draft.read(bias)])


def _multiply_dynamic(draft: Draft, node: Node, x: Any, weight: Any, scale: Any, bias: Any) -> str:
    """Dynamic quantization as ONNX Runtime knows it; the order of the products is the one it fuses."""
    whole, step, zero_point = draft.add_several("DynamicQuantizeLinear", [draft.read(x)], 3)
    summed = draft.add("MatMulInteger", [whole, draft.read(weight), zero_point])
    factor = draft.add("Mul", [step, draft.read(scale)])
    y = draft.add("Mul", [draft.add("Cast", [summed], to=1), factor])
    return y if bias is None else draft.add("Add", [y, draft.read(bias)])


def _attend(
    draft: Draft, node: Node, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    sizes, dtype = draft.kind(key).sizes, draft.kind(query).dtype
    if dropout_p or is_causal or enable_gqa or sizes[-1] is None:
        raise NoForm("attention with a mask of its own")
    turned = [*range(len(sizes) - 2), len(sizes) - 1, len(sizes) - 2]
    products = draft.add("MatMul", [draft.read(query), draft.add("Transpose", [draft.read(key)], perm=turned)])
    factor = 1.0 / math.sqrt(sizes[-1]) if scale is None else scale
    scores = draft.add("Mul", [products, draft.read(factor, dtype)])
    if attn_mask is not None:
        mask = draft.read(attn_mask)
        if draft.kind(attn_mask).dtype != dtype:
            mask = draft.add("Where", [mask, draft.read(0.0, dtype), draft.read(-math.inf, dtype)])
        scores = draft.add("Add", [scores, mask])
    return draft.add("MatMul", [draft.add("Softmax", [scores], axis=-1), draft.read(value)])


def _quantize(
    draft: Draft, node: Node, x: Any, scale: float, zero_point: int, q_min: int, q_max: int, dtype: Any
) -> str:
    kind = to_numpy(dtype)
    step, zero = draft.hold(scale, np.float32), draft.hold(zero_point, kind)
    whole = draft.add("QuantizeLinear", [draft.read(x), step, zero])
    if (q_min, q_max) == (np.iinfo(kind).min, np.iinfo(kind).max):
        return whole
    # QuantizeLinear saturates at its type's ends; a coarser grid is cut in integers, so that kernels still fuse.
    return draft.add("Clip", [whole, draft.hold(q_min, kind), draft.hold(q_max, kind)])


def _dequantize(draft: Draft, node: Node, q: Any, scale: float, zero_point: int, *rest: Any) -> str:
    kind = to_numpy(draft.kind(q).dtype)
    return draft.add("DequantizeLinear", [draft.read(q), draft.hold(scale, np.float32), draft.hold(zero_point, kind)])


def _dequantize_channels(draft: Draft, node: Node, q: Any, scales: Any, zeros: Any, axis: int, *rest: Any) -> str:
    kind = to_numpy(draft.kind(q).dtype)
    inputs = [draft.read(q), draft.read(scales)]
    if kind != np.int32 and zeros is not None:  # a zero point of that type may only be zero
        values = draft.constants[draft.read(zeros)].astype(kind)
        inputs.append(draft.hold(values, kind))
    return draft.add("DequantizeLinear", inputs, axis=axis)


def _apply(operator: str, draft: Draft, node: Node, x: Any) -> str:
    return draft.add(operator, [draft.read(x)])


def _pass_on(draft: Draft, node: Node, x: Any, *rest: Any, **options: Any) -> str:
    return draft.read(x)


def _combine(operator: str, draft: Draft, node: Node, left: Any, right: Any, alpha: Any = 1) -> str:
    if alpha != 1:
        raise NoForm("alpha")
    dtype = draft.kind(node).dtype
    return draft.add(operator, [draft.read(left, dtype), draft.read(right, dtype)])


def _subtract_from(draft: Draft, node: Node, x: Any, other: Any, alpha: Any = 1) -> str:
    return _combine("Sub", draft, node, other, x, alpha)


def _clip(draft: Draft, node: Node, x: Any, low: Any = None, high: Any = None) -> str:
    dtype = draft.kind(x).dtype
    if draft.kind(node).dtype != dtype or (low is None and high is None):
        raise NoForm("a clamp that changes the type")
    ends = ["" if end is None else draft.read(end, dtype) for end in (low, high)]
    return draft.add("Clip", [draft.read(x), *(ends if ends[1] else ends[:1])])


def _clip_hard(draft: Draft, node: Node, x: Any, low: Any = -1.0, high: Any = 1.0) -> str:
    return _clip(draft, node, x, low, high)


def _leak(draft: Draft, node: Node, x: Any, slope: float = 0.01) -> str:
    return draft.add("LeakyRelu", [draft.read(x)], alpha=float(slope))


def _swish(draft: Draft, node: Node, x: Any) -> str:
    return draft.add("Mul", [draft.read(x), draft.add("Sigmoid", [draft.read(x)])])


def _sigmoid_hard(draft: Draft, node: Node, x: Any) -> str:
    return draft.add("HardSigmoid", [draft.read(x)], alpha=1 / 6, beta=0.5)


def _gelu(draft: Draft, node: Node, x: Any, approximate: str = "none") -> str:
    if approximate != "none":
        raise NoForm("an approximate GELU")
    source, dtype = draft.read(x), draft.kind(x).dtype
    share = draft.add("Erf", [draft.add("Div", [source, draft.read(math.sqrt(2), dtype)])])
    half = draft.add("Mul", [draft.read(0.5, dtype), draft.add("Add", [share, draft.read(1.0, dtype)])])
    return draft.add("Mul", [source, half])


def _softmax(draft: Draft, node: Node, x: Any, dim: int, dtype: Any = None) -> str:
    return draft.add("Softmax", [draft.read(x, draft.kind(node).dtype)], axis=dim)


def _normalise_layer(
    draft: Draft, node: Node, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any,
) -> str:  # fmt: skip
    if weight is None:
        raise NoForm("a LayerNorm without weights")
    inputs = [draft.read(x), draft.read(weight), *([] if bias is None else [draft.read(bias)])]
    return draft.add("LayerNormalization", inputs, axis=-len(shape), epsilon=eps, stash_type=1)


def _average(draft: Draft, node: Node, x: Any, dims: Sequence[int], keepdim: bool = False) -> str:
    rank = len(draft.kind(x).sizes)
    axes = sorted(dim % rank for dim in dims)
    if rank != 4 or axes != [2, 3]:
        return draft.add("ReduceMean", [draft.read(x), draft.hold_sizes(axes)], keepdims=int(keepdim))
    pooled = draft.add("GlobalAveragePool", [draft.read(x)])  # it has an integer kernel; ReduceMean has none
    return pooled if keepdim else draft.add("Flatten", [pooled], axis=1)


def _sum(draft: Draft, node: Node, x: Any, dims: Sequence[int] | None = None, keepdim: bool = False) -> str:
    if not dims:
        raise NoForm("a sum over everything")
    source = draft.read(x, draft.kind(node).dtype)
    return draft.add("ReduceSum", [source, draft.hold_sizes(list(dims))], keepdims=int(keepdim))


def _normalise_groups(
    draft: Draft, node: Node, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> str:
    kind = draft.kind(x)
    ones, zeros = (draft.hold(np.full(groups, number), to_numpy(kind.dtype)) for number in (1, 0))
    parts = draft.add("Reshape", [draft.read(x), draft.hold_sizes([0, groups, -1])])
    y = draft.add("InstanceNormalization", [parts, ones, zeros], epsilon=eps)
    y = draft.add("Reshape", [y, draft.add("Shape", [draft.read(x)])])
    column = draft.hold_sizes([-1, *[1] * (len(kind.sizes) - 2)])
    for operator, value in (("Mul", weight), ("Add", bias)):
        if value is not None:
            y = draft.add(operator, [y, draft.add("Reshape", [draft.read(value), column])])
    return y


def _stack(draft: Draft, node: Node, values: Sequence[Any], dim: int = 0) -> str:
    dtype, axis = draft.kind(node).dtype, dim % len(draft.kind(node).sizes)
    parts = [draft.add("Unsqueeze", [draft.read(value, dtype), draft.hold_sizes([axis])]) for value in values]
    return draft.add("Concat", parts, axis=axis)


def _roll(draft: Draft, node: Node, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> str:
    y, sizes = draft.read(x), draft.kind(x).sizes
    if len(shifts) != len(dims) or not all(isinstance(s, int) for s in shifts) or any(sizes[d] is None for d in dims):
        raise NoForm("a turn of everything, or by a size")
    for shift, dim in zip(shifts, dims, strict=True):
        place = -shift % (sizes[dim] or 1)
        if place:
            y = draft.add(
                "Concat", [cut(draft, y, dim, place, sizes[dim] or 0), cut(draft, y, dim, 0, place)], axis=dim
            )
    return y


def _raise(draft: Draft, node: Node, x: Any, exponent: Any) -> str:
    dtype = draft.kind(node).dtype
    return draft.add("Pow", [draft.read(x, dtype), draft.read(exponent, dtype)])


def _invert_root(draft: Draft, node: Node, x: Any) -> str:
    return draft.add("Reciprocal", [draft.add("Sqrt", [draft.read(x)])])


def _reduce(operator: str, draft: Draft, node: Node, x: Any, dims: Sequence[int], keepdim: bool = False) -> str:
    if not dims:
        raise NoForm("a reduction over everything")
    return draft.add(operator, [draft.read(x), draft.hold_sizes(list(dims))], keepdims=int(keepdim))


def _measure_length(
    draft: Draft, node: Node, x: Any, order: float = 2, dims: Sequence[int] = (), keepdim: bool = False, *rest: Any
) -> str:
    if order not in (1, 2) or rest:
        raise NoForm(f"a norm of order {order}")
    return _reduce("ReduceL1" if order == 1 else "ReduceL2", draft, node, x, dims, keepdim)


def _choose(draft: Draft, node: Node, condition: Any, left: Any, right: Any) -> str:
    dtype = draft.kind(node).dtype
    return draft.add("Where", [draft.read(condition), draft.read(left, dtype), draft.read(right, dtype)])


def _fill(draft: Draft, node: Node, x: Any, mask: Any, value: Any) -> str:
    return _choose(draft, node, mask, value, x)


def _reshape(draft: Draft, node: Node, x: Any, *rest: Any) -> str:
    sizes = draft.kind(node).sizes
    if sizes.count(None) > 1 or 0 in sizes:
        raise NoForm("a shape with two free sizes")
    return draft.add("Reshape", [draft.read(x), draft.hold_sizes([-1 if s is None else s for s in sizes])])


def _permute(draft: Draft, node: Node, x: Any, order: Sequence[int]) -> str:
    rank = len(draft.kind(x).sizes)
    return draft.add("Transpose", [draft.read(x)], perm=[axis % rank for axis in order])


def _swap(draft: Draft, node: Node, x: Any, first: int = 0, second: int = 1) -> str:
    order = list(range(len(draft.kind(x).sizes)))
    order[first], order[second] = order[second], order[first]
    return draft.add("Transpose", [draft.read(x)], perm=order)


def _join(draft: Draft, node: Node, values: Sequence[Any], dim: int = 0) -> str:
    dtype = draft.kind(node).dtype
    return draft.add("Concat", [draft.read(value, dtype) for value in values], axis=dim)


def _insert_axis(draft: Draft, node: Node, x: Any, dim: int) -> str:
    return draft.add("Unsqueeze", [draft.read(x), draft.hold_sizes([dim])])


def _take(draft: Draft, node: Node, x: Any, dim: int, index: int) -> str:
    if not isinstance(index, int):
        raise NoForm("a place that depends on a size")
    return draft.add("Gather", [draft.read(x), draft.hold(index, np.int64)], axis=dim)


def _slice(draft: Draft, node: Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    limits = [0 if start is None else start, np.iinfo(np.int64).max if end is None else end, step]
    if not all(isinstance(limit, (int, np.integer)) for limit in limits):
        raise NoForm("a slice that depends on a size")
    return cut(draft, draft.read(x), dim, *limits)


def _split(draft: Draft, node: Node, x: Any, sizes: Any, dim: int = 0) -> list[str]:
    kinds: list[Kind] = draft.kinds[node]
    lengths = [kind.sizes[dim] or 0 for kind in kinds]
    if 0 in lengths:
        raise NoForm("parts of the batch, or empty ones")
    return draft.add_several("Split", [draft.read(x), draft.hold_sizes(lengths)], len(lengths), axis=dim)


def _unbind(draft: Draft, node: Node, x: Any, dim: int = 0) -> list[str]:
    if draft.kind(x).sizes[dim] is None:
        raise NoForm("the batch taken apart")
    parts = [cut(draft, draft.read(x), dim, place, place + 1) for place in range(len(draft.kinds[node]))]
    return [draft.add("Squeeze", [part, draft.hold_sizes([dim])]) for part in parts]


def _get_item(draft: Draft, node: Node, values: Any, index: int) -> str:
    names = draft.names.get(values)
    if not isinstance(names, list):
        raise NoForm("an item of no list")
    name: str = names[index]
    return name


def _expand(draft: Draft, node: Node, x: Any, sizes: Any, implicit: bool = False) -> str:
    kind = draft.kind(node)
    if None not in kind.sizes:
        return draft.add("Expand", [draft.read(x), draft.hold_sizes([s for s in kind.sizes if s is not None])])
    if any(size is None and not batch for size, batch in zip(kind.sizes, kind.is_batch, strict=True)):
        raise NoForm("a multiple of the batch")
    batch = draft.add("Shape", [draft.batch_source], start=0, end=1)
    parts = [batch if size is None else draft.hold_sizes([size]) for size in kind.sizes]
    return draft.add("Expand", [draft.read(x), draft.add("Concat", parts, axis=0)])


def _look_up(draft: Draft, node: Node, table: Any, places: Any, *rest: Any) -> str:
    return draft.add("Gather", [draft.read(table), draft.read(places)], axis=0)


def _cast(draft: Draft, node: Node, x: Any, *rest: Any, **options: Any) -> str:
    return draft.read(x, draft.kind(node).dtype)


def _normalise_batch(
    draft: Draft, node: Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool,
    momentum: float, eps: float, *rest: Any,
) -> str:  # fmt: skip
    if training or mean is None or variance is None:
        raise NoForm("BatchNorm by the statistics of its batch")
    like = draft.constants.get(draft.read(mean))
    if like is None:
        raise NoForm("BatchNorm by computed statistics")
    scale, shift = (
        draft.hold(np.full_like(like, number), like.dtype) if value is None else draft.read(value)
        for value, number in ((weight, 1), (bias, 0))
    )
    return draft.add(
        "BatchNormalization", [draft.read(x), scale, shift, draft.read(mean), draft.read(variance)], epsilon=eps
    )


FORMS: dict[str, Form] = {
    "jettison.quantize_per_tensor.default": _quantize,
    "jettison.linear_dynamic.default": _multiply_dynamic,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantize,
    "quantized_decomposed.dequantize_per_channel.default": _dequantize_channels,
    "aten.conv1d.default": convolve,
    "aten.conv1d.padding": convolve,
    "aten.conv2d.default": convolve,
    "aten.conv2d.padding": convolve,
    "aten.conv3d.default": convolve,
    "aten.conv3d.padding": convolve,
    "aten.conv_transpose1d.default": transpose_convolve,
    "aten.conv_transpose2d.input": transpose_convolve,
    "aten.conv_transpose3d.input": transpose_convolve,
    "aten.linear.default": _multiply_weight,
    "aten.matmul.default": partial(_combine, "MatMul"),
    "aten.bmm.default": partial(_combine, "MatMul"),
    "aten.scaled_dot_product_attention.default": _attend,
    "aten.relu.default": partial(_apply, "Relu"),
    "aten.sigmoid.default": partial(_apply, "Sigmoid"),
    "aten.tanh.default": partial(_apply, "Tanh"),
    "aten.exp.default": partial(_apply, "Exp"),
    "aten.sqrt.default": partial(_apply, "Sqrt"),
    "aten.abs.default": partial(_apply, "Abs"),
    "aten.neg.default": partial(_apply, "Neg"),
    "aten.sin.default": partial(_apply, "Sin"),
    "aten.cos.default": partial(_apply, "Cos"),
    "aten.rsqrt.default": _invert_root,
    "aten.pow.Tensor_Scalar": _raise,
    "aten.hardswish.default": partial(_apply, "HardSwish"),
    "aten.relu6.default": partial(_clip, low=0.0, high=6.0),
    "aten.hardtanh.default": _clip_hard,
    "aten.clamp.default": _clip,
    "aten.clamp_min.default": _clip,
    "aten.leaky_relu.default": _leak,
    "aten.silu.default": _swish,
    "aten.hardsigmoid.default": _sigmoid_hard,
    "aten.gelu.default": _gelu,
    "aten.softmax.int": _softmax,
    "aten.layer_norm.default": _normalise_layer,
    "aten.batch_norm.default": _normalise_batch,
    "aten.group_norm.default": _normalise_groups,
    "aten.add.Tensor": partial(_combine, "Add"),
    "aten.sub.Tensor": partial(_combine, "Sub"),
    "aten.mul.Tensor": partial(_combine, "Mul"),
    "aten.div.Tensor": partial(_combine, "Div"),
    "aten.rsub.Scalar": _subtract_from,
    "aten.mean.dim": _average,
    "aten.sum.dim_IntList": _sum,
    "aten.amax.default": partial(_reduce, "ReduceMax"),
    "aten.linalg_vector_norm.default": _measure_length,
    "aten.upsample_nearest2d.vec": enlarge_nearest,
    "aten.upsample_bilinear2d.vec": enlarge_linear,
    "aten.adaptive_avg_pool1d.default": average_adaptive,
    "aten.adaptive_avg_pool2d.default": average_adaptive,
    "aten.adaptive_avg_pool3d.default": average_adaptive,
    "aten.max_pool2d.default": partial(pool, "MaxPool"),
    "aten.max_pool3d.default": partial(pool, "MaxPool"),
    "aten.avg_pool2d.default": partial(pool, "AveragePool"),
    "aten.flatten.using_ints": _reshape,
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.reshape_as.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.permute.default": _permute,
    "aten.transpose.int": _swap,
    "aten.cat.default": _join,
    "aten.stack.default": _stack,
    "aten.roll.default": _roll,
    "aten.where.self": _choose,
    "aten.masked_fill.Scalar": _fill,
    "aten.unsqueeze.default": _insert_axis,
    "aten.select.int": _take,
    "aten.slice.Tensor": _slice,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": _unbind,
    "<built-in function getitem>": _get_item,
    "aten.expand.default": _expand,
    "aten.expand_as.default": _expand,
    "aten.embedding.default": _look_up,
    "aten.to.dtype": _cast,
    "aten.to.device": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.type_as.default": _cast,
    "aten._to_copy.default": _cast,
    "aten.contiguous.default": _pass_on,
    "aten.alias.default": _pass_on,
    "aten.dropout.default": _pass_on,
    "aten.detach.default": _pass_on,
    "aten.clone.default": _pass_on,
    "aten.constant_pad_nd.default": pad_constant,
    "aten.pad.default": pad,
}
