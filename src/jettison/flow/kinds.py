"""The kinds of quantization that need no ranges: dynamic int8, weight-only, and sixteen-bit storage."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule

from jettison.core.errors import InputError, UnknownName
from jettison.quantization.convert import Quantized
from jettison.quantization.dynamic import quantize_dynamic
from jettison.quantization.half import HALVES, store_half
from jettison.quantization.weight_only import quantize_weights
from jettison.targets.integer import IntegerScheme
from jettison.targets.operators import GROUP_KERNELS

KINDS = ("static", "dynamic", "weight-only", *HALVES)


def check_kind(kind: str, target: str) -> None:
    """Refuse a kind that is none, or that `target` has no kernels for."""
    if kind not in KINDS:
        raise UnknownName("kind of quantization", kind, KINDS)
    if kind in ("dynamic", "weight-only", *HALVES) and target not in GROUP_KERNELS:
        raise InputError(
            f"kind={kind!r} cannot be written for target={target!r}. Its files hold no such layers here. "
            f"Choose kind='static', or a target among {', '.join(GROUP_KERNELS)}."
        )
    if kind == "dynamic" and target == "openvino":
        raise InputError(
            "kind='dynamic' with target='openvino' would be slower than fp32: OpenVINO computes these layers in float. "
            "It has been measured on a BERT. Use kind='weight-only', which was faster there."
        )


def apply_kind(
    module: GraphModule,
    kind: str,
    *,
    scheme: IntegerScheme,
    target: str,
    weight_bits: int | None,
    group_size: int,
    exclude: Collection[str],
    attention: bool = False,
) -> Quantized:
    """Return a flat graph in a kind other than "static"; raises what that kind's function raises."""
    if kind == "dynamic":
        if weight_bits not in (None, 8):
            raise InputError(
                f"weight_bits={weight_bits} with kind='dynamic'. Its kernels take 8. Leave weight_bits out."
            )
        return quantize_dynamic(module, levels=scheme.weight, exclude=exclude, attention=attention)
    if attention:
        raise InputError(f"attention=True with kind={kind!r}, which has no integer products. Choose kind='dynamic'.")
    if kind == "weight-only":
        bits = 4 if weight_bits is None else weight_bits
        kernels = GROUP_KERNELS[target]
        return quantize_weights(module, bits=bits, group=group_size, exclude=exclude, kernels=kernels)
    if weight_bits not in (None, 16):
        raise InputError(f"weight_bits={weight_bits} with kind={kind!r}, which stores 16. Leave weight_bits out.")
    return store_half(module, dtype=kind, exclude=exclude)
