"""One small rule per operator family: what an ATen operator says about the axes of its inputs and outputs.

`RULES` is keyed by the overload packet. A rule gets a `Walk` and returns the terms of the output (a tuple of
terms, or a tuple of such tuples), or None where this form of the operator is not covered: it is then opaque.
Element-wise operators need no entry; they are known by `torch.Tag.pointwise`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.analyse import Dims, Rule, Walk
from jettison.graph.axes import Cat, Prod, Term, flag, make_axis
from jettison.graph.movement import (
    channel_shuffle,
    concatenate,
    expand,
    expand_as,
    get_item,
    look_up,
    overwrite,
    pad,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    put,
    repeat,
    repeat_interleave,
    reshape,
    reshape_as,
    resolve_dim,
    select,
    select_scatter,
    slice_dimension,
    slice_scatter,
    split,
    squeeze,
    stack,
    transpose,
    transpose_matrix,
    turn,
    unbind,
    unsqueeze,
)
from jettison.graph.recurrent import recurrence, recurrent_step
from jettison.graph.reductions import reduce_dimensions
from jettison.graph.selection import (
    columns_of_patches,
    deformed_convolution,
    differences,
    gather,
    index_select,
    list_positions,
    move_dimensions,
    narrow,
    one_hot,
    patches_of_columns,
    pick_by_value,
    pick_number,
    pool_regions,
    run_along,
    slide,
    spread,
)
from jettison.graph.trace import hint, shape_of

aten = torch.ops.aten


def elementwise(walk: Walk) -> Any:
    """Broadcast all tensor operands from the right."""
    if not isinstance(walk.node.meta["val"], Tensor):
        return list_positions(walk)  # `where` with a condition alone
    operands = [n for n in walk.node.all_input_nodes if shape_of(n) is not None]
    return walk.broadcast([walk.dims(n) for n in operands])


def unchanged(walk: Walk) -> Dims:
    """The first argument's axes: dropout, clone, casts."""
    return walk.dims(walk.args[0])


def convolution(walk: Walk) -> Dims | None:
    """x[N, C, *space] with w[O, C/groups, *kernel]; `groups` is itself an axis that may lose positions."""
    x, w = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    if len(x) != len(w):
        return None  # a single sample without its batch
    groups = int(walk.arg(6, "groups", 1))
    walk.fix(*x[2:], *w[2:], because="spatial size")
    out: Term = w[0]
    if groups == 1:
        walk.same(x[1], w[1])
    else:
        out = _grouped(walk, x[1], w[1], w[0], groups)
    return _with_bias(walk, out, x)


def transposed_convolution(walk: Walk) -> Dims | None:
    """x[N, C, *space] with w[C, O/groups, *kernel]."""
    x, w = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    if len(x) != len(w):
        return None  # a single sample without its batch
    groups = int(walk.arg(6, "groups", 1))
    walk.fix(*x[2:], *w[2:], because="spatial size")
    walk.same(x[1], w[0])
    out: Term = w[1]
    if groups > 1:
        axis = make_axis(groups)
        inner = make_axis(x[1].size // groups)
        walk.same(x[1], Prod((axis, inner)))
        walk.axes.group_axes[walk.node] = axis
        out = Prod((axis, w[1]))
    return _with_bias(walk, out, x)


def _grouped(walk: Walk, channels: Term, per_group: Term, out: Term, groups: int) -> Term:
    axis = make_axis(groups)
    walk.axes.group_axes[walk.node] = axis
    walk.same(channels, Prod((axis, per_group)))
    walk.same(out, Prod((axis, make_axis(out.size // groups))))
    return out


def _with_bias(walk: Walk, out: Term, x: Dims) -> Dims:
    bias = walk.arg(2, "bias")
    if isinstance(bias, fx.Node):
        walk.same(walk.dims(bias)[0], out)
    return (x[0], out, *(walk.fixed(s) for s in walk.shape[2:]))


def linear(walk: Walk) -> Dims:
    """x[..., I] with w[O, I]."""
    x, w = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    walk.same(x[-1], w[1])
    bias = walk.arg(2, "bias")
    if isinstance(bias, fx.Node):
        walk.same(walk.dims(bias)[0], w[0])
    return (*x[:-1], w[0])


def batch_norm(walk: Walk) -> Dims:
    """Weight, bias and running statistics lie along the channels; statistics of the batch keep all else whole."""
    x = walk.dims(walk.args[0])
    if walk.arg(5, "training", False):
        for term in (x[0], *x[2:]):
            flag(term, "normalised")
    for argument in walk.args[1:5]:
        if isinstance(argument, fx.Node):
            walk.same(walk.dims(argument)[0], x[1])
    return x


def layer_norm(walk: Walk) -> Dims:
    """Statistics are taken over the trailing dimensions: exact only with statistics over what is kept."""
    x = walk.dims(walk.args[0])
    count = len(walk.args[1])
    for term in x[-count:]:
        flag(term, "normalised")
    for argument in walk.args[2:4]:
        if isinstance(argument, fx.Node):
            for mine, theirs in zip(walk.dims(argument), x[-count:], strict=True):
                walk.same(mine, theirs)
    return x


def weight_norm(walk: Walk) -> Dims:
    """A weight of direction v and length g: the length is taken over all dimensions but one."""
    v, g = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    dim = resolve_dim(walk.arg(2, "dim", 0), len(v))
    walk.fix(*v[:dim], *v[dim + 1 :], because="a norm is taken over it")
    walk.same(v[dim], g[dim])
    return v


def group_norm(walk: Walk) -> Dims:
    """Whole groups come away exactly; positions inside a group change its statistics."""
    x = walk.dims(walk.args[0])
    groups = int(walk.args[1])
    axis, inner = make_axis(groups), make_axis(x[1].size // groups)
    flag(inner, "normalised")
    walk.same(x[1], Prod((axis, inner)))
    walk.axes.group_axes[walk.node] = axis
    for index, name in ((2, "weight"), (3, "bias")):
        argument = walk.arg(index, name)
        if isinstance(argument, fx.Node):
            walk.same(walk.dims(argument)[0], x[1])
    return x


def matmul(walk: Walk) -> Dims | None:
    """a[..., M, K] with b[..., K, N]; vectors are left to the opaque case."""
    a, b = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    if len(a) < 2 or len(b) < 2:
        return None
    walk.same(a[-1], b[-2])
    return (*walk.broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


def addmm(walk: Walk) -> Dims:
    """Bias + a[M, K] b[K, N]."""
    bias, a, b = (walk.dims(n) for n in walk.args[:3])
    walk.same(a[1], b[0])
    return walk.broadcast([bias, (a[0], b[1])])


def attention(walk: Walk) -> Dims | None:
    """Scaled dot product attention; its default scale depends on the size of the last axis of q."""
    q, k, v = (walk.dims(n) for n in walk.args[:3])
    if walk.node.kwargs.get("enable_gqa"):
        if len(q) != 4 or q[1].size % k[1].size:
            return None
        walk.same(k[1], v[1])
        walk.same(q[1], Prod((k[1], make_axis(q[1].size // k[1].size))))
        k, v = ((t[0], q[1], *t[2:]) for t in (k, v))
    walk.same(q[-1], k[-1])
    flag(q[-1], "scaled")
    walk.same(k[-2], v[-2])
    walk.fix(k[-2], because="attention takes a softmax over it")
    if walk.arg(5, "is_causal", False):
        walk.fix(q[-2], because="the causal mask counts positions")
    lead = walk.broadcast([q[:-2], k[:-2], v[:-2]])
    mask = walk.arg(3, "attn_mask")
    if isinstance(mask, fx.Node):
        walk.broadcast([walk.dims(mask), (*lead, q[-2], k[-2])])
    return (*lead, q[-2], v[-1])


def softmax(walk: Walk) -> Dims:
    """What a softmax runs over must stay whole."""
    x = walk.dims(walk.args[0])
    walk.fix(x[resolve_dim(walk.arg(1, "dim", -1), len(x))], because="a softmax runs over it")
    return x


def keep_channels(rank: int) -> Rule:
    """Return the rule of pooling, resizing and mirroring over `rank` dimensions of space: batch and channels pass."""

    def rule(walk: Walk) -> Any:
        x = walk.dims(walk.args[0])
        if len(x) != rank + 2:
            return None  # a single sample without its batch
        walk.fix(*x[2:], because="spatial size")
        value = walk.node.meta["val"]
        if isinstance(value, Tensor):
            return (*x[:2], *(walk.fixed(s) for s in walk.shape[2:]))
        return tuple((*x[:2], *(walk.fixed(hint(s)) for s in v.shape[2:])) for v in value)

    return rule


def instance_norm(walk: Walk) -> Dims:
    """Each channel of each sample by itself: channels pass, space is normalised over."""
    x = walk.dims(walk.args[0])
    walk.fix(*x[2:], because="normalised over")
    return batch_norm(walk)


def gated(walk: Walk) -> Dims:
    """glu: the first half times the sigmoid of the second, position by position."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(1, "dim", -1), len(x))
    half = make_axis(walk.shape[dim])
    walk.same(x[dim], Cat((half, half)))
    return (*x[:dim], half, *x[dim + 1 :])


def einsum(walk: Walk) -> Dims | None:
    """One axis per letter; dots, and letters twice in one operand, are left to the opaque case."""
    left, arrow, right = str(walk.args[0]).replace(" ", "").partition("->")
    letters: dict[str, Term] = {}
    for names, operand in zip(left.split(","), walk.args[1], strict=True):
        dims = walk.dims(operand)
        if not arrow or len(set(names)) != len(names) or len(names) != len(dims) or "." in names:
            return None
        for letter, term in zip(names, dims, strict=True):
            if letters.setdefault(letter, term).size != term.size:
                return None
            walk.same(letters[letter], term)
    return tuple(letters[letter] for letter in right)


def check_only(walk: Walk) -> tuple[()] | None:
    """Assertions about type and device; those about sizes would no longer hold."""
    return None if walk.arg(1, "size") is not None or walk.arg(2, "stride") is not None else ()


def embedding(walk: Walk) -> Dims:
    """Rows are looked up by number, columns are features."""
    w, index = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    walk.fix(w[0], because="rows are looked up by number")
    return (*index, w[1])


def prelu(walk: Walk) -> Dims:
    """One slope for all, or one per channel."""
    x, w = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    if w and w[0].size != 1:
        walk.same(w[0], x[1])
    return x


def constant(walk: Walk) -> Dims:
    """One number everywhere: no position differs from another, so each dimension is an axis whose size is rewritten."""
    return tuple(make_axis(s) for s in walk.shape)


def fresh(walk: Walk) -> Dims:
    """A tensor of numbers that tell positions apart: every size stays as written."""
    return tuple(walk.fixed(s, "made with this size") for s in walk.shape)


_ROWS: list[tuple[Rule, str]] = [
    (convolution, "conv1d conv2d conv3d"),
    (transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (elementwise, "hardswish log_sigmoid masked_fill where rsub floor_divide __and__ __or__ __xor__"),
    (linear, "linear"),
    (batch_norm, "batch_norm"),
    (layer_norm, "layer_norm rms_norm"),
    (instance_norm, "instance_norm"),
    (weight_norm, "_weight_norm"),
    (group_norm, "group_norm"),
    (gated, "glu"),
    (einsum, "einsum"),
    (matmul, "matmul bmm mm"),
    (addmm, "addmm"),
    (attention, "scaled_dot_product_attention"),
    (concatenate, "cat concat"),
    (stack, "stack"),
    (split, "split split_with_sizes chunk tensor_split"),
    (unbind, "unbind"),
    (slice_dimension, "slice"),
    (slice_scatter, "slice_scatter"),
    (select_scatter, "select_scatter"),
    (overwrite, "copy"),
    (select, "select"),
    (reshape, "view reshape flatten unflatten _unsafe_view"),
    (permute, "permute"),
    (transpose, "transpose swapaxes"),
    (transpose_matrix, "t"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (expand, "expand"),
    (reduce_dimensions, "mean sum amax amin std var std_mean var_mean linalg_vector_norm"),
    (reduce_dimensions, "prod logsumexp all any"),
    (softmax, "softmax log_softmax"),
    (keep_channels(1), "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d"),
    (keep_channels(1), "upsample_linear1d reflection_pad1d replication_pad1d"),
    (keep_channels(2), "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d"),
    (keep_channels(2), "upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d"),
    (keep_channels(3), "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d"),
    (keep_channels(3), "upsample_trilinear3d reflection_pad3d replication_pad3d"),
    (pad, "constant_pad_nd pad"),
    (pixel_shuffle, "pixel_shuffle"),
    (pixel_unshuffle, "pixel_unshuffle"),
    (channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (expand_as, "expand_as"),
    (reshape_as, "view_as reshape_as"),
    (repeat, "repeat tile"),
    (repeat_interleave, "repeat_interleave"),
    (turn, "roll flip"),
    (look_up, "index"),
    (put, "index_put"),
    (index_select, "index_select"),
    (gather, "gather"),
    (spread, "meshgrid"),
    (one_hot, "one_hot"),
    (list_positions, "nonzero nonzero_numpy"),
    (run_along, "cumsum cumprod logcumsumexp"),
    (differences, "diff"),
    (pick_by_value, "sort argsort topk max min median mode kthvalue"),
    (pick_number, "argmax argmin"),
    (slide, "unfold"),
    (columns_of_patches, "im2col"),
    (patches_of_columns, "col2im"),
    (narrow, "narrow"),
    (move_dimensions, "movedim moveaxis"),
    (embedding, "embedding"),
    (prelu, "prelu"),
    (unchanged, "dropout feature_dropout alpha_dropout clone contiguous detach alias to _to_copy lift_fresh_copy"),
    (unchanged, "hardtanh relu6 type_as zeros_like ones_like full_like empty_like"),
    (check_only, "_assert_tensor_metadata"),
    (constant, "full zeros ones empty new_full new_zeros new_ones new_empty"),
    (fresh, "arange scalar_tensor"),
    (recurrence, "lstm gru rnn_tanh rnn_relu"),
    (recurrent_step, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
]


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {getattr(aten, name): rule for rule, names in _ROWS for name in names.split()}
    table[operator.getitem] = get_item
    # By name: these operators exist only where torchvision has been imported.
    table |= {"torchvision.roi_align": pool_regions, "torchvision.roi_pool": pool_regions}
    table["torchvision.deform_conv2d"] = deformed_convolution
    return table


RULES: dict[Any, Rule] = _table()
"""The rule of each operator; one line adds a family."""

__all__ = ["RULES", "elementwise", "resolve_dim"]
