"""Rules for operators that move positions and compute nothing: join, part, reorder, repeat and regroup."""

from __future__ import annotations

import torch

from jettison.graph.analyse import Dims, Walk
from jettison.graph.axes import ONE, Cat, Prod, Term, make_axis, regroup
from jettison.graph.trace import hint


def concatenate(walk: Walk) -> Dims:
    """Sizes add up along one dimension; the others are the same."""
    parts = [walk.dims(n) for n in walk.args[0] if walk.dims(n) != ()]
    dim = resolve_dim(walk.arg(1, "dim", 0), len(parts[0]))
    for other in parts[1:]:
        for index, (mine, theirs) in enumerate(zip(parts[0], other, strict=True)):
            if index != dim:
                walk.same(mine, theirs)
    out = list(parts[0])
    out[dim] = Cat(tuple(p[dim] for p in parts))
    return tuple(out)


def stack(walk: Walk) -> Dims:
    """A new dimension that counts the parts; all else is the same."""
    parts = [walk.dims(n) for n in walk.args[0]]
    dim = resolve_dim(walk.arg(1, "dim", 0), len(parts[0]) + 1)
    for other in parts[1:]:
        for mine, theirs in zip(parts[0], other, strict=True):
            walk.same(mine, theirs)
    return (*parts[0][:dim], walk.fixed(len(parts), "stacked"), *parts[0][dim:])


def split(walk: Walk) -> tuple[Dims, ...]:
    """split, chunk and split_with_sizes: the dimension is the parts one after the other."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(2, "dim", 0), len(x))
    parts = [make_axis(hint(v.shape[dim])) for v in walk.node.meta["val"]]
    walk.same(x[dim], Cat(tuple(parts)))
    return tuple((*x[:dim], part, *x[dim + 1 :]) for part in parts)


def unbind(walk: Walk) -> tuple[Dims, ...]:
    """One output per position of a dimension, which therefore stays whole."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(1, "dim", 0), len(x))
    walk.fix(x[dim], because="taken apart one by one")
    return tuple((*x[:dim], *x[dim + 1 :]) for _ in walk.node.meta["val"])


def get_item(walk: Walk) -> Dims:
    """One output of an operator with several."""
    found = walk.axes.terms[walk.args[0]]
    dims = found[walk.args[1]]
    assert isinstance(dims, tuple)
    return dims


def slice_dimension(walk: Walk) -> Dims:
    """A run of positions is the middle of three parts; a stride keeps the dimension whole."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(1, "dim", 0), len(x))
    size, kept = x[dim].size, walk.shape[dim]
    step = walk.arg(4, "step", 1)
    out = list(x)
    if kept == size:
        return x
    start = walk.arg(2, "start", 0) or 0
    if step != 1 or not isinstance(start, int):
        walk.fix(x[dim], because="sliced with a stride")
        out[dim] = walk.fixed(kept, "sliced with a stride")
        return tuple(out)
    out[dim] = make_axis(kept)
    cut_out(walk, x[dim], start, out[dim])
    return tuple(out)


def slice_scatter(walk: Walk) -> Dims | None:
    """A run of positions is written over: the source is the middle of three parts."""
    x, source = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    dim = resolve_dim(walk.arg(2, "dim", 0), len(x))
    start, step = walk.arg(3, "start", 0) or 0, walk.arg(5, "step", 1)
    size, count = x[dim].size, source[dim].size
    for i, (mine, theirs) in enumerate(zip(x, source, strict=True)):
        if i != dim or count == size:
            walk.same(mine, theirs)
    if count == size:
        return x
    if step != 1 or not isinstance(start, int):
        walk.fix(x[dim], source[dim], because="written with a stride")
        return x
    cut_out(walk, x[dim], start, source[dim])
    return x


def select_scatter(walk: Walk) -> Dims:
    """One position, named by number, is written over: its dimension stays whole."""
    x, source = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    dim = resolve_dim(walk.arg(2, "dim"), len(x))
    walk.fix(x[dim], because="one position is picked by number")
    for mine, theirs in zip((*x[:dim], *x[dim + 1 :]), source, strict=True):
        walk.same(mine, theirs)
    return x


def overwrite(walk: Walk) -> Dims:
    """Copy: the target's dimensions, filled from a source that may be broadcast."""
    x, source = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    walk.broadcast([x, source])
    return x


def select(walk: Walk) -> Dims:
    """One position is picked by number, so its dimension stays whole."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(1, "dim", 0), len(x))
    walk.fix(x[dim], because="one position is picked by number")
    return (*x[:dim], *x[dim + 1 :])


def reshape(walk: Walk) -> Dims:
    """Reshape, view, flatten, unflatten: the same positions under other dimensions.

    The dimensions are compared stretch by stretch, between places where both sides have passed equally many positions:
    where one stretch has no common refinement (space cut once into sevens, once into pairs) it alone stays whole.
    """
    out: list[Term] = []
    for terms, sizes in _match_stretches(walk.dims(walk.args[0]), walk.shape):
        regrouped = regroup(terms, sizes)
        if regrouped is None:
            text = "cut in two ways that have no common refinement"
            walk.fix(*terms, because=text)
            regrouped = [walk.fixed(s, text) for s in sizes]
        out += regrouped
    return tuple(out)


def _match_stretches(x: Dims, shape: tuple[int, ...]) -> list[tuple[Dims, tuple[int, ...]]]:
    """Pair the shortest runs of dimensions on both sides that hold equally many positions."""
    if 0 in shape:
        return [(x, shape)]
    stretches = []
    i = j = 0
    while i < len(x) or j < len(shape):
        first, begin = i, j
        have, want = 1, 1
        while True:
            if have <= want and i < len(x) and (have < want or i == first):
                have *= x[i].size
                i += 1
            elif j < len(shape) and (want < have or j == begin):
                want *= shape[j]
                j += 1
            else:
                break
        stretches.append((x[first:i], shape[begin:j]))
    return stretches


def permute(walk: Walk) -> Dims:
    """Dimensions in another order."""
    x = walk.dims(walk.args[0])
    return tuple(x[resolve_dim(d, len(x))] for d in walk.args[1])


def transpose(walk: Walk) -> Dims:
    """Two dimensions change places."""
    x = list(walk.dims(walk.args[0]))
    first, second = (resolve_dim(d, len(x)) for d in walk.args[1:3])
    x[first], x[second] = x[second], x[first]
    return tuple(x)


def transpose_matrix(walk: Walk) -> Dims:
    """`.t()` of a matrix or vector."""
    return tuple(reversed(walk.dims(walk.args[0])))


def unsqueeze(walk: Walk) -> Dims:
    """A new dimension of size one."""
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.args[1], len(x) + 1)
    return (*x[:dim], ONE, *x[dim:])


def squeeze(walk: Walk) -> Dims:
    """Dimensions of size one vanish: those named, or all."""
    x = walk.dims(walk.args[0])
    named = walk.arg(1, "dim")
    if named is None:
        gone = set(range(len(x)))
    else:
        gone = {resolve_dim(d, len(x)) for d in ([named] if isinstance(named, int) else named)}
    return tuple(t for i, t in enumerate(x) if not (i in gone and t.size == 1))


def expand(walk: Walk) -> Dims:
    """Dimensions of size one are repeated; the copies are an axis of their own."""
    x, shape = walk.dims(walk.args[0]), walk.shape
    x = (ONE,) * (len(shape) - len(x)) + tuple(x)
    return tuple(make_axis(s) if t.size == 1 and s != 1 else t for t, s in zip(x, shape, strict=True))


def pad(walk: Walk) -> Dims:
    """Padded dimensions get frozen positions before and after."""
    x = walk.dims(walk.args[0])
    widths = [int(w) for w in walk.args[1]]
    mode = walk.arg(2, "mode", "constant") if walk.node.target == torch.ops.aten.pad.default else "constant"
    out = list(x)
    for index in range(len(widths) // 2):
        before, after = widths[2 * index : 2 * index + 2]
        dim = len(x) - 1 - index
        if (before or after) and mode != "constant":
            walk.fix(x[dim], because="padded with its own values")
            out[dim] = walk.fixed(walk.shape[dim], "padded with its own values")
        elif before < 0 or after < 0:
            walk.fix(x[dim], because="cropped by negative padding")
            out[dim] = walk.fixed(walk.shape[dim])
        elif before or after:
            sides = [walk.fixed(n, "padding") if n else None for n in (before, after)]
            out[dim] = Cat(tuple(t for t in (sides[0], x[dim], sides[1]) if t is not None))
    return tuple(out)


def pixel_shuffle(walk: Walk) -> Dims | None:
    """Channels are (channel, r, r); the r's become space."""
    x = walk.dims(walk.args[0])
    factor = int(walk.args[1]) ** 2
    if len(x) != 4:
        return None
    channel = make_axis(x[1].size // factor)
    walk.same(x[1], Prod((channel, walk.fixed(factor, "sub-pixels"))))
    return (x[0], channel, *(walk.fixed(s) for s in walk.shape[2:]))


def pixel_unshuffle(walk: Walk) -> Dims | None:
    """Sub-pixels of space become the fast part of the channels."""
    x = walk.dims(walk.args[0])
    factor = int(walk.args[1]) ** 2
    if len(x) != 4:
        return None
    walk.fix(*x[2:], because="spatial size")
    return (x[0], Prod((x[1], walk.fixed(factor, "sub-pixels"))), *(walk.fixed(s) for s in walk.shape[2:]))


def channel_shuffle(walk: Walk) -> Dims:
    """(groups, channels) become (channels, groups); the number of groups is an argument and stays."""
    x, groups = walk.dims(walk.args[0]), int(walk.args[1])
    outer, inner = walk.fixed(groups, "the number of shuffled groups"), make_axis(x[1].size // groups)
    walk.same(x[1], Prod((outer, inner)))
    return (x[0], Prod((inner, outer)), *x[2:])


def expand_as(walk: Walk) -> Dims:
    """Dimensions of size one become the other tensor's, the rest already are."""
    x, other = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    return walk.broadcast([x, other])


def reshape_as(walk: Walk) -> Dims:
    """The same positions under the dimensions of another tensor."""
    regrouped = reshape(walk)
    for mine, theirs in zip(regrouped, walk.dims(walk.args[1]), strict=True):
        walk.same(mine, theirs)
    return regrouped


def repeat(walk: Walk) -> Dims:
    """Whole copies one after the other: the copy runs slowest."""
    counts = [c if isinstance(c, int) else hint(c.meta["val"]) for c in walk.args[1]]
    x = (ONE,) * (len(counts) - len(walk.dims(walk.args[0]))) + walk.dims(walk.args[0])
    counts = [1] * (len(x) - len(counts)) + counts
    return tuple(Prod((walk.fixed(c, "copies"), t)) for c, t in zip(counts, x, strict=True))


def repeat_interleave(walk: Walk) -> Dims | None:
    """Each position several times: the copy runs fastest."""
    x, dim = walk.dims(walk.args[0]), walk.arg(2, "dim")
    if not isinstance(walk.args[1], int) or not isinstance(dim, int):
        return None
    out: list[Term] = list(x)
    at = resolve_dim(dim, len(x))
    out[at] = Prod((x[at], walk.fixed(walk.args[1], "copies")))
    return tuple(out)


def turn(walk: Walk) -> Dims:
    """Roll and flip: positions change places along dimensions that therefore stay whole."""
    x = walk.dims(walk.args[0])
    named = walk.arg(2, "dims", []) if walk.node.target == torch.ops.aten.roll.default else walk.args[1]
    dims = [named] if isinstance(named, int) else list(named) or range(len(x))
    walk.fix(*(x[resolve_dim(d, len(x))] for d in dims), because="positions change places")
    return x


def look_up(walk: Walk) -> Dims | None:
    """Rows looked up by number: the dimensions looked into stay whole, those beside them pass."""
    x, numbers = walk.dims(walk.args[0]), list(walk.args[1])
    at = [i for i, n in enumerate(numbers) if n is not None]
    looked = [numbers[i] for i in at]
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in looked) or at != list(range(at[0], at[-1] + 1)):
        return None
    walk.fix(*(x[i] for i in at), because="looked up by number")
    found = walk.broadcast([walk.dims(n) for n in looked])
    return (*x[: at[0]], *found, *x[at[-1] + 1 :])


def put(walk: Walk) -> Dims | None:
    """x[numbers] = values: the dimensions looked into stay whole, those behind them are the values' own."""
    x, numbers = walk.dims(walk.args[0]), list(walk.args[1])
    if any(n is None for n in numbers):
        return None
    for number in numbers:  # a removed number would be a place that is not written
        walk.fix(*walk.dims(number), because="looked up by number")
    masks = [n for n in numbers if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    looked = sum(len(walk.dims(n)) if n in masks else 1 for n in numbers)
    walk.fix(*x[:looked], because="looked up by number")
    values = walk.dims(walk.args[2])
    behind = x[looked:]
    walk.fix(*values[: max(0, len(values) - len(behind))], because="looked up by number")
    if behind and values:
        walk.broadcast([behind, values[-len(behind) :]])
    return x


def cut_out(walk: Walk, whole: Term, start: int, middle: Term) -> None:
    """State that `whole` is what comes before `middle`, `middle` from position `start` on, and what comes after."""
    start = resolve_start(start, whole.size)
    before, after = (make_axis(n) for n in (start, whole.size - start - middle.size))
    walk.same(whole, Cat(tuple(t for t in (before, middle, after) if t.size)))


def resolve_start(start: int, size: int) -> int:
    """Return the first position of a slice counted from the front, at most `size`."""
    return min(start + size if start < 0 else start, size)


def resolve_dim(dim: int, rank: int) -> int:
    """Return a dimension counted from the front."""
    return dim + rank if dim < 0 else dim
