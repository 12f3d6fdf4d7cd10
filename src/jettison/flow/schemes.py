"""The integer arithmetic of a target, or why it has none."""

from __future__ import annotations

from jettison.core.errors import InputError
from jettison.targets import find_target
from jettison.targets.integer import IntegerScheme


def find_scheme(target: str) -> IntegerScheme:
    """Return a target's scheme; raises InputError where it runs no integers, and what `find_target` raises."""
    runtime = find_target(target)
    if "int8" not in runtime.PRECISIONS:
        raise InputError(
            f"target={target!r} computes in {', '.join(runtime.PRECISIONS)} and has no integer kernels. "
            "Nothing quantized would run there. Choose 'onnxruntime', 'openvino', 'executorch', 'litert', 'inductor'; "
            "or compress without integers: recipe=Recipe(quantize=False)."
        )
    scheme: IntegerScheme = runtime.scheme()
    return scheme
