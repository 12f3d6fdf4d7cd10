"""What an ExecuTorch file holds: its XNNPACK parts taken apart, and the runtime's own profile of them.

Importing this module imports executorch; import it inside functions.
"""

from __future__ import annotations

import json
import re
import statistics
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary

from jettison.core.errors import CheckpointError
from jettison.targets.audit import Operator
from jettison.targets.converted import fingerprint

HEAD = struct.Struct("<4x4sHIIIQ")
"""Of an XNNPACK part: magic, length of the head, where the graph and the constants stand."""
TYPES = {"qint8": "int8", "quint8": "int8", "qcint8": "int8", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
MOVING = ("XNNStaticTranspose", "XNNStaticReshape", "XNNCopy", "XNNStaticSlice", "XNNStaticConstantPad")
COMPUTING = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected", "XNNConvTranspose2d")
TIMED = ("Convolution", "Fully Connected", "Deconvolution")
"""How the file and XNNPACK's profile name what has weights."""
INSIDE = 2**32 - 1
"""The external number of a tensor that does not leave its part."""


def list_operators(data: bytes, layers: Mapping[str, str]) -> tuple[Operator, ...]:
    """Return the operators of a file in its order: those handed to XNNPACK, then ExecuTorch's own.

    `layers` has for each integer layer the fingerprint of its weights. Raises CheckpointError where a part cannot be
    read.
    """
    try:
        file = deserialize_pte_binary(data)
        plan = file.program.execution_plan[0]
        parts = [file.program.backend_delegate_data[d.processed.index].data for d in plan.delegates]
        graphs = [_read_part(part) for part in parts]
    except (ValueError, IndexError, struct.error, AttributeError) as error:
        raise CheckpointError(f"The file's XNNPACK parts cannot be read: {error}. Export it anew.") from error
    names = {digest: name for name, digest in layers.items()}
    stored = _list_stored(file)
    found = [_read_node(node, graph, stored, names) for graph in graphs for node in graph["xnodes"]]
    return (*found, *(Operator(o.name, o.name, "fp32", (), False, None) for o in plan.operators))


def _read_part(part: bytes) -> dict[str, Any]:
    """Return one XNNPACK part as the plain data its schema describes."""
    magic, _, start, size, _, _ = HEAD.unpack_from(part)
    if magic != b"XH00":
        raise ValueError(f"a part begins with {magic!r}")
    schema = files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(schema)
        (folder / "graph.bin").write_bytes(part[start : start + size])
        _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        # flatc writes the open ends of clamps as no JSON has them.
        text = re.sub(r"(?<=[:\s\[])(-?)inf(?=[,\s\]])", r"\1Infinity", (folder / "graph.json").read_text())
    graph: dict[str, Any] = json.loads(text)
    graph["tensors"] = {t["id_out"]: t for t in map(_plain_tensor, graph["xvalues"])}
    return graph


def _plain_tensor(value: Mapping[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = value["xvalue_union"]
    plain: dict[str, Any] = inner.get("tensor_value", inner)
    return plain


def _list_stored(file: Any) -> dict[str, bytes]:
    named = file.named_data
    if named is None:
        return {}
    return {
        key: bytes(named.buffers[place if isinstance(place, int) else place.buffer_index])
        for key, place in named.pte_data.items()
    }


def _read_node(
    node: Mapping[str, Any], graph: Mapping[str, Any], stored: Mapping[str, bytes], names: Mapping[str, str]
) -> Operator:
    kind, inner = node["xnode_union_type"], node["xnode_union"]
    tensors = [graph["tensors"][v] for k, v in inner.items() if k.endswith("_id") and v in graph["tensors"]]
    kinds = [t["datatype"].removeprefix("xnn_datatype_") for t in tensors]
    covers: tuple[str, ...] = ()
    weight = graph["tensors"].get(inner.get("filter_id"))
    if weight is not None:
        key = graph["constant_data"][weight["constant_buffer_idx"]]["named_key"]
        name = names.get(fingerprint(np.frombuffer(stored[key], np.int8))) if key in stored else None
        covers = (name,) if name else ()
    precision = _tell_precision(kind, kinds)
    label = covers[0] if covers else f"{kind.removeprefix('XNN')}_{node['debug_handle']}"
    alone = precision == "rounding" and all(t["external_id"] == INSIDE for t in tensors)
    return Operator(label, f"{kind} {' '.join(kinds)}", precision, covers, alone, None)


def _tell_precision(kind: str, kinds: Sequence[str]) -> str:
    """Return what an operator computes in: integers only where every tensor but the bias is of integers."""
    found = {TYPES[k] for k in kinds if k in TYPES}
    if kind == "XNNConvert":
        return "rounding" if found == {"int8", "fp32"} else "other"
    if kind in MOVING or not found:
        return "other"
    return found.pop() if len(found) == 1 else "fp32"


def time_operators(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], operators: Sequence[Operator], *, runs: int
) -> tuple[Operator, ...]:
    """Return what the runtime's own profile names, with median milliseconds.

    The profile knows no layers: where it names as many operators with weights as the file has, they are taken in order.
    """
    from executorch.devtools import Inspector
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    module = _load_for_executorch(str(path), enable_etdump=True)
    tensors = [torch.from_numpy(a) for a in arrays]
    warm = max(3, runs // 10)
    for _ in range(warm + runs):
        module.forward(tensors)
    with tempfile.TemporaryDirectory() as name:
        dump = str(Path(name) / "times.etdp")
        module.write_etdump_result_to_file(dump)
        events = [e for b in Inspector(etdump_path=dump).event_blocks if b.name == "Execute" for e in b.events]
    found = []
    for event in events:
        own = event.name.startswith("native_call_")
        if (event.is_delegated_op or own) and event.perf_data is not None:
            name = event.name.removeprefix("native_call_")
            ms = statistics.median(event.perf_data.raw[warm:])
            found.append(Operator(name, name, "fp32" if own else _read_kernel(name), (), False, ms))
    weighted = [o for o in operators if o.kernel.startswith(COMPUTING)]
    places = [i for i, o in enumerate(found) if o.name.startswith(TIMED)]
    if len(weighted) == len(places):
        for place, operator in zip(places, weighted, strict=True):
            found[place] = replace(found[place], name=operator.name, covers=operator.covers)
    return tuple(found)


def _read_kernel(name: str) -> str:
    """Return the precision that XNNPACK writes into its kernels' names, "Fully Connected (NC, QS8, QC8W) GEMM"."""
    inner = name.partition("(")[2].partition(")")[0]
    if name.startswith("Convert"):
        return "rounding"
    if any(kind in inner for kind in ("QS8", "QU8", "QC8")):
        return "int8"
    return "fp32" if "F32" in inner else "other"
