"""The ONNX forms of what works on a picture's axes: convolution, pooling, resizing, padding; see `onnx_forms`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jettison.targets.onnx_direct import Draft, NoForm

if TYPE_CHECKING:
    from torch.fx import Node


def _spread(value: Any, rank: int) -> list[int]:
    """Return a size for each picture axis."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, int) for v in values):
        raise NoForm(f"the sizes {value!r}")
    return values * rank if len(values) == 1 else values


def convolve(
    draft: Draft, node: Node, x: Any, weight: Any, bias: Any = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> str:  # fmt: skip
    """Convolution of any rank; what padding="same" adds is split as PyTorch splits it."""
    kernel = [size for size in draft.kind(weight).sizes[2:] if size is not None]
    steps = _spread(dilation, len(kernel))
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
        pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
    else:
        pads = _spread(0 if padding == "valid" else padding, len(kernel)) * 2
    inputs = [draft.read(x), draft.read(weight), *([] if bias is None else [draft.read(bias)])]
    return draft.add(
        "Conv", inputs, kernel_shape=kernel, strides=_spread(stride, len(kernel)), pads=pads, dilations=steps,
        group=groups,
    )  # fmt: skip


def transpose_convolve(
    draft: Draft, node: Node, x: Any, weight: Any, bias: Any = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> str:  # fmt: skip
    """Transposed convolution of any rank."""
    kernel = [size for size in draft.kind(weight).sizes[2:] if size is not None]
    rank = len(kernel)
    inputs = [draft.read(x), draft.read(weight), *([] if bias is None else [draft.read(bias)])]
    return draft.add(
        "ConvTranspose", inputs, kernel_shape=kernel, strides=_spread(stride, rank), pads=_spread(padding, rank) * 2,
        dilations=_spread(dilation, rank), group=groups, output_padding=_spread(output_padding, rank),
    )  # fmt: skip


def average_adaptive(draft: Draft, node: Node, x: Any, size: Sequence[int]) -> str:
    """Means over everything, or over parts of equal size."""
    before, after = draft.kind(x).sizes[2:], draft.kind(node).sizes[2:]
    if set(after) == {1}:
        return draft.add("GlobalAveragePool", [draft.read(x)])
    kernel = [a // b if a and b and a % b == 0 else 0 for a, b in zip(before, after, strict=True)]
    if 0 in kernel:
        raise NoForm("adaptive pooling to places of unequal size")
    return draft.add("AveragePool", [draft.read(x)], kernel_shape=kernel, strides=kernel)


def pool(
    operator: str, draft: Draft, node: Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, *rest: Any
) -> str:
    """MaxPool or AveragePool; one that rounds up its windows only where they come out even."""
    rank = len(draft.kind(x).sizes) - 2
    size = _spread(kernel, rank)
    options: dict[str, Any] = {"kernel_shape": size, "pads": _spread(padding, rank) * 2}
    options["strides"] = _spread(stride, rank) if stride not in ((), []) else size
    names = ("dilation", "ceil") if operator == "MaxPool" else ("ceil", "count", "divisor")
    given = dict(zip(names, rest, strict=False))
    if given.get("divisor") is not None or (given.get("ceil") and not _fits(draft, node, x, options, given, rank)):
        raise NoForm("pooling that rounds up")
    if operator == "MaxPool":
        options["dilations"] = _spread(given.get("dilation", 1), rank)
    else:
        options["count_include_pad"] = int(given.get("count", True))
    return draft.add(operator, [draft.read(x)], **options)


def _fits(draft: Draft, node: Node, x: Any, options: dict[str, Any], given: dict[str, Any], rank: int) -> bool:
    """Say if windows come out even, so that rounding up their number is rounding down."""
    after = draft.kind(node).sizes[2:]
    steps = _spread(given.get("dilation", 1), rank)
    for place, (size, count) in enumerate(zip(draft.kind(x).sizes[2:], after, strict=True)):
        kernel, stride, pad = (options[key][place] for key in ("kernel_shape", "strides", "pads"))
        if size is None or (size + 2 * pad - steps[place] * (kernel - 1) - 1) // stride + 1 != count:
            return False
    return True


def _scale(draft: Draft, node: Node, x: Any) -> list[float]:
    """Return how much longer each picture axis gets."""
    pairs = list(zip(draft.kind(x).sizes[2:], draft.kind(node).sizes[2:], strict=True))
    if any(not a or not b for a, b in pairs):
        raise NoForm("a picture of free size")
    # The new size is the old one times a float32, rounded down, which must not fall short.
    return [float(np.nextafter(np.float32(b / a), np.inf)) if b % a else b / a for a, b in pairs if a and b]


def _resize(draft: Draft, x: Any, factors: Sequence[float], **options: Any) -> str:
    scales = draft.hold([1.0, 1.0, *factors], np.float32)
    return draft.add("Resize", [draft.read(x), "", scales], **options)


def enlarge_nearest(draft: Draft, node: Node, x: Any, *rest: Any) -> str:
    """Nearest neighbours by whole factors, where both sides mean the same neighbour."""
    factors = _scale(draft, node, x)
    if any(f != int(f) for f in factors):
        raise NoForm("nearest neighbours at no whole factor")
    return _resize(draft, x, factors, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric")


def enlarge_linear(
    draft: Draft, node: Node, x: Any, size: Any, align_corners: bool, given: Sequence[float] | None = None
) -> str:
    """Bilinear interpolation to a size."""
    pairs = zip(draft.kind(x).sizes[2:], draft.kind(node).sizes[2:], strict=True)
    if given is not None and any((a or 0) * f != b for (a, b), f in zip(pairs, given, strict=True)):
        raise NoForm("interpolation by a factor of its own, whatever the size comes to")
    mode = "align_corners" if align_corners else "pytorch_half_pixel"
    return _resize(draft, x, _scale(draft, node, x), mode="linear", coordinate_transformation_mode=mode)


def pad(draft: Draft, node: Node, x: Any, pads: Sequence[int], mode: str = "constant", value: Any = None) -> str:
    """Padding with a constant; negative widths cut."""
    if mode != "constant" or not all(isinstance(width, int) for width in pads):
        raise NoForm("padding with more than a constant")
    rank, dtype = len(draft.kind(x).sizes), draft.kind(x).dtype
    source = draft.read(x)
    for place in range(len(pads) // 2):
        front, back = (max(0, -width) for width in pads[2 * place : 2 * place + 2])
        if front or back:
            source = cut(draft, source, rank - 1 - place, front, -back if back else np.iinfo(np.int64).max)
    pads = [max(0, width) for width in pads]
    before, after = [0] * rank, [0] * rank
    for place in range(len(pads) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = pads[2 * place], pads[2 * place + 1]
    return draft.add("Pad", [source, draft.hold_sizes([*before, *after]), draft.read(value or 0.0, dtype)])


def pad_constant(draft: Draft, node: Node, x: Any, pads: Sequence[int], value: Any = 0) -> str:
    """The same, as its other operator calls it."""
    return pad(draft, node, x, pads, "constant", value)


def cut(draft: Draft, source: str, dim: int, start: int, end: int, step: int = 1) -> str:
    """Slice one axis."""
    return draft.add("Slice", [source, *(draft.hold_sizes([value]) for value in (start, end, dim, step))])
