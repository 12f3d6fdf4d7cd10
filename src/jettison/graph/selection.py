"""Rules for operators that choose by value or by number, and for those that run along a dimension in order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from jettison.graph.analyse import Dims, Walk
from jettison.graph.axes import ONE, Prod, Term, make_axis
from jettison.graph.movement import cut_out, resolve_dim
from jettison.graph.trace import hint


def run_along(walk: Walk) -> Dims:
    """cumsum, cumprod, logcumsumexp: each position depends on those before it, so the dimension stays whole."""
    x = walk.dims(walk.args[0])
    if x:
        walk.fix(x[resolve_dim(walk.arg(1, "dim"), len(x))], because="accumulated over")
    return x


def differences(walk: Walk) -> Dims:
    """Diff: neighbours along one dimension, which comes out with another length."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(2, "dim", -1), len(x))
    walk.fix(x[dim], because="neighbours are compared along it")
    for end in (walk.arg(3, "prepend"), walk.arg(4, "append")):
        for i, term in enumerate(walk.dims(end) if isinstance(end, fx.Node) else ()):
            if i == dim:
                walk.fix(term, because="neighbours are compared along it")
            else:
                walk.same(term, x[i])
    return (*x[:dim], walk.fixed(walk.shape[dim], "neighbours are compared along it"), *x[dim + 1 :])


def pick_by_value(walk: Walk) -> Any:
    """Sort, topk, max and min over a dimension: what is ordered by value stays whole."""
    if walk.node.target._overloadname == "other":  # type: ignore[union-attr]  # of two tensors
        return walk.broadcast([walk.dims(walk.args[0]), walk.dims(walk.args[1])])
    x = walk.dims(walk.args[0])
    named = next((a.name for a in walk.node.target._schema.arguments if a.name == "dim"), None)  # type: ignore[union-attr]
    if named is None or not x:
        walk.fix(*x, because="ordered by value")
        return () if isinstance(walk.node.meta["val"], Tensor) else None
    position = [a.name for a in walk.node.target._schema.arguments].index("dim")  # type: ignore[union-attr]
    dim = resolve_dim(walk.arg(position, "dim", -1), len(x))
    walk.fix(x[dim], because="ordered by value")

    def shape(value: Tensor) -> Dims:
        sizes = [hint(s) for s in value.shape]
        if len(sizes) < len(x):
            return (*x[:dim], *x[dim + 1 :])
        return (*x[:dim], walk.fixed(sizes[dim], "ordered by value"), *x[dim + 1 :])

    value = walk.node.meta["val"]
    return shape(value) if isinstance(value, Tensor) else tuple(shape(v) for v in value)


def pick_number(walk: Walk) -> Dims | None:
    """Argmax and argmin: a dimension, or all, is searched."""
    x = walk.dims(walk.args[0])
    dim = walk.arg(1, "dim")
    if dim is None:
        walk.fix(*x, because="searched for its largest value")
        return tuple(ONE for _ in walk.shape) if all(s == 1 for s in walk.shape) else None
    at = resolve_dim(dim, len(x))
    walk.fix(x[at], because="searched for its largest value")
    return (*x[:at], *([ONE] if len(walk.shape) == len(x) else []), *x[at + 1 :])


def list_positions(walk: Walk) -> Any:
    """Nonzero, and `where` with a condition alone: how many positions come out depends on values."""
    walk.fix(*walk.dims(walk.args[0]), because="its positions are listed by value")
    value = walk.node.meta["val"]
    text = "listed by value"
    if isinstance(value, Tensor):
        return tuple(walk.fixed(hint(s), text) for s in value.shape)
    return tuple(tuple(walk.fixed(hint(s), text) for s in v.shape) for v in value)


def spread(walk: Walk) -> tuple[Dims, ...]:
    """Meshgrid: the numbers of several vectors along one dimension each; every output is as large as all of them."""
    for vector in walk.args[0]:
        walk.fix(*walk.dims(vector), because="spread out over a grid")
    return tuple(tuple(walk.fixed(hint(s), "a grid") for s in v.shape) for v in walk.node.meta["val"])


def one_hot(walk: Walk) -> Dims:
    """A new last dimension that counts classes."""
    return (*walk.dims(walk.args[0]), walk.fixed(walk.shape[-1], "counts classes"))


def gather(walk: Walk) -> Dims | None:
    """Gather: along one dimension positions are named by number; the index lies along the others."""
    x, index = walk.dims(walk.args[0]), walk.dims(walk.args[2])
    if not x or len(x) != len(index):
        return None
    dim = resolve_dim(walk.args[1], len(x))
    walk.fix(x[dim], because="looked up by number")
    out = list(index)
    for i, (mine, theirs) in enumerate(zip(x, index, strict=True)):
        if i != dim and mine.size != theirs.size:
            walk.fix(mine, because="looked up by number")  # only its first positions are read
        elif i != dim:
            walk.same(mine, theirs)
            out[i] = mine
    return tuple(out)


def index_select(walk: Walk) -> Dims:
    """Rows by number along one dimension."""
    x, index = walk.dims(walk.args[0]), walk.dims(walk.args[2])
    dim = resolve_dim(walk.args[1], len(x))
    walk.fix(x[dim], because="looked up by number")
    return (*x[:dim], index[0] if index else ONE, *x[dim + 1 :])


def slide(walk: Walk) -> Dims:
    """x.unfold(dim, size, step): windows along a dimension, which stays whole; their content comes last."""
    x = walk.dims(walk.args[0])
    if not x:
        return (walk.fixed(walk.shape[0], "cut into windows"),)
    dim = resolve_dim(walk.args[1], len(x))
    walk.fix(x[dim], because="cut into windows")
    windows, content = walk.shape[dim], walk.shape[-1]
    text = "cut into windows"
    return (*x[:dim], walk.fixed(windows, text), *x[dim + 1 :], walk.fixed(content, text))


def columns_of_patches(walk: Walk) -> Dims | None:
    """F.unfold: [N, C, H, W] becomes [N, C x taps, places]."""
    x = walk.dims(walk.args[0])
    if len(x) != 4:
        return None
    walk.fix(*x[2:], because="spatial size")
    taps = walk.shape[1] // x[1].size
    return (x[0], Prod((x[1], walk.fixed(taps, "kernel size"))), walk.fixed(walk.shape[2]))


def patches_of_columns(walk: Walk) -> Dims | None:
    """F.fold: [N, C x taps, places] becomes [N, C, H, W]."""
    x = walk.dims(walk.args[0])
    if len(x) != 3:
        return None
    channels = make_axis(walk.shape[1])
    walk.same(x[1], Prod((channels, walk.fixed(x[1].size // walk.shape[1], "kernel size"))))
    walk.fix(x[2], because="spatial size")
    return (x[0], channels, *(walk.fixed(s) for s in walk.shape[2:]))


def narrow(walk: Walk) -> Dims | None:
    """A run of positions by start and length: the middle of three parts."""
    x = walk.dims(walk.args[0])
    dim, start, length = resolve_dim(walk.args[1], len(x)), walk.args[2], walk.args[3]
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    middle: Term = make_axis(length)
    cut_out(walk, x[dim], start, middle)
    return (*x[:dim], middle, *x[dim + 1 :])


def move_dimensions(walk: Walk) -> Dims:
    """movedim: some dimensions go elsewhere, the others keep their order."""
    x = walk.dims(walk.args[0])
    sources, places = ([d] if isinstance(d, int) else list(d) for d in walk.args[1:3])
    goes = {resolve_dim(p, len(x)): x[resolve_dim(s, len(x))] for s, p in zip(sources, places, strict=True)}
    moved = {resolve_dim(s, len(x)) for s in sources}
    rest = iter(t for i, t in enumerate(x) if i not in moved)
    return tuple(goes[i] if i in goes else next(rest) for i in range(len(x)))


def pool_regions(walk: Walk) -> Dims | None:
    """roi_align, roi_pool: [N, C, H, W] read at [K, 5] places gives [K, C, h, w]."""
    x, regions = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    walk.fix(*x[2:], x[0], *regions[1:], because="read at places given by number")
    return (regions[0], x[1], *(walk.fixed(s) for s in walk.shape[2:]))


def deformed_convolution(walk: Walk) -> Dims | None:
    """deform_conv2d without groups: the channels of input and weight are the same, offsets stay whole."""
    x, w, *others = (walk.dims(a) for a in walk.args[:5] if isinstance(a, fx.Node))
    offset_groups = walk.arg(12, "offset_groups", 1)
    if walk.shape[1] != w[0].size or x[1].size != w[1].size:
        return None
    walk.fix(*x[2:], *w[2:], because="spatial size")
    walk.same(x[1], w[1])
    if offset_groups != 1:
        walk.fix(x[1], because="its channels are read at places of their own, run by run")
    for dims in others:
        if len(dims) == 1:
            walk.same(dims[0], w[0])
        else:
            walk.fix(*dims[1:], because="places that are read")
    return (x[0], w[0], *(walk.fixed(s) for s in walk.shape[2:]))
