"""Attention of other than four dimensions, which torch.onnx's own translation refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def make_translations() -> dict[Any, Callable[..., Any]]:
    """Return the ONNX form of scaled_dot_product_attention on tensors of two dimensions or more."""
    import torch
    from onnxscript.function_libs.torch_lib.ops import nn

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if len(query.shape) == 4:  # in the form that ONNX Runtime fuses
            return nn.aten_scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if enable_gqa or dropout_p:
            raise NotImplementedError(
                f"scaled_dot_product_attention of {len(query.shape)} dimensions with enable_gqa or dropout"
            )
        return _attend(query, key, value, attn_mask, is_causal, scale)

    return {torch.ops.aten.scaled_dot_product_attention.default: attend}


def _attend(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    import onnx_ir
    import onnxscript

    op: Any = onnxscript.opset18
    last = len(key.shape) - 1
    turned = op.Transpose(key, perm=[*range(last - 1), last, last - 1])
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.Mul(op.MatMul(query, turned), op.CastLike(op.Constant(value_float=factor), query))
    if is_causal:
        rows, columns = (_count(op, x, last - 1) for x in (query, key))
        mask = op.GreaterOrEqual(op.Unsqueeze(rows, op.Constant(value_ints=[1])), columns)
    if mask is not None:
        if is_causal or mask.dtype == onnx_ir.DataType.BOOL:
            kept, hidden = (op.CastLike(op.Constant(value_float=v), query) for v in (0.0, -math.inf))
            mask = op.Where(mask, kept, hidden)
        scores = op.Add(scores, mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _count(op: Any, x: Any, axis: int) -> Any:
    """Return 0, 1, … along one axis, whose length may be the free batch."""
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    start, step = (op.Constant(value_int=v) for v in (0, 1))
    return op.Range(start, length, step)
