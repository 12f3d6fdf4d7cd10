"""Dynamic int8 for attention's own products, of two activations each: queries with keys, and weights with values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.fold import name_operator
from jettison.quantization.replay import find_constants
from jettison.targets.operators import product_operator

PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default"})
FUSED = "aten.scaled_dot_product_attention.default"


def quantize_products(module: GraphModule) -> tuple[int, int]:
    """Put products of two activations on integers, in place; returns how many, and how many stayed float.

    Causal and grouped attention in one operator stays float, as do products of vectors.
    """
    constants = find_constants(module)
    done = left = 0
    for node in list(module.graph.nodes):
        operator = name_operator(node)
        if operator == FUSED:
            written = _write_out(module, node)
            done, left = done + 2 * written, left + 2 * (not written)
        elif operator in PRODUCTS and not constants.intersection(node.all_input_nodes):
            if all(_count_axes(a) >= 2 for a in node.args):
                node.target = product_operator()
                done += 1
            else:
                left += 1
    module.recompile()
    return done, left


def _count_axes(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def _write_out(module: GraphModule, node: Node) -> bool:
    """Replace one fused attention by its two products and what lies between; False where that is not known."""
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    width = query.meta["val"].shape[-1] if isinstance(query, Node) and _count_axes(query) else None
    known = mask is None or _count_axes(mask) > 0
    if (
        not isinstance(width, int)
        or not known
        or given.get("is_causal")
        or given.get("enable_gqa")
        or given.get("dropout_p")
    ):
        return False
    aten = torch.ops.aten

    def call(target: Any, *arguments: Any) -> Node:
        with module.graph.inserting_before(node):
            return module.graph.call_function(target, arguments)

    scores = call(product_operator(), query, call(aten.transpose.int, key, -2, -1))
    scale = given.get("scale")
    scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(width) if scale is None else scale)
    if isinstance(mask, Node):
        if mask.meta["val"].dtype == torch.bool:
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), -math.inf)
        else:
            scores = call(aten.add.Tensor, scores, mask)
    mixed = call(product_operator(), call(aten.softmax.int, scores, -1), value)
    mixed.meta = dict(node.meta)
    node.replace_all_uses_with(mixed)
    module.graph.erase_node(node)
    return True
