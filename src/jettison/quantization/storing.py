"""A quantized network on disk: graph, widths, integers, scales and zero points together, as JSON and safetensors.

The scales of activations stand in the graph's JSON, which writes a float so that the very same one is read back; what
weights are made of lies in the safetensors file. One digest covers both, so that neither can be damaged or taken from
another network unnoticed. Loading runs no code from either.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from jettison.core.errors import CheckpointError, ExportError
from jettison.core.plain import from_plain, to_plain, write_json
from jettison.graph.sizing import Size, make_sizes, read_sizes
from jettison.graph.store import describe_graph, read_tensors, restore_graph, save_tensors
from jettison.graph.trace import nest
from jettison.quantization.convert import Quantized, Site, quiet_torchao
from jettison.targets.integer import quantize_operator
from jettison.targets.operators import dynamic_operator, groups_operator, product_operator
from jettison.targets.recurrent import lstm_operator, scan_operator

FORMAT = "jettison.quantized/1"
HEAD, TENSORS = "quantized.json", "quantized.safetensors"
FILES = (HEAD, TENSORS)


@dataclass(frozen=True)
class QuantizedFile:
    """What `quantized.json` holds; `digest` is over all the rest of it and over the safetensors file."""

    format: str
    digest: str
    inputs: tuple[Size, ...]
    sites: tuple[Site, ...]
    note: str
    graph: Any


def save_quantized(quantized: Quantized, folder: Path) -> Path:
    """Write `quantized.json` and `quantized.safetensors` into `folder`, which is made if need be; returns it.

    Raises ExportError for a graph that cannot be written as data, StorageError where a file cannot be written.
    """
    module = quantized.module
    sizes = read_sizes(module)
    if sizes is None:
        raise ExportError(
            "The module of this Quantized is not the graph that jettison made: its inputs have no sizes. "
            "Save what `quantize` or `train_quantized` returned."
        )
    graph = describe_graph(module, *_read_specs(module))
    save_tensors(module, folder / TENSORS)
    file = QuantizedFile(FORMAT, "", sizes, quantized.sites, quantized.note, graph)
    write_json(replace(file, digest=_digest(file, folder / TENSORS)), folder / HEAD)
    return folder


def load_quantized(folder: Path | str) -> Quantized:
    """Return what `Quantized.save` or `compress` wrote into `folder`, in any process: its outputs are the same bits.

    The module needs none of your code, and `export` takes it. Raises CheckpointError where the files are damaged, are
    not of one network, or were written by another version.
    """
    folder = Path(folder)
    path = folder / HEAD
    found = _read_head(path)
    if _digest(found, folder / TENSORS) != found.digest:
        raise CheckpointError(
            f"{path} and {TENSORS} beside it are not what was saved: one is damaged or of another network. "
            "Copy both anew from where they were saved, or quantize again."
        )
    register_operators()
    module, in_spec, out_spec = restore_graph(found.graph, read_tensors(folder / TENSORS), path)
    nested = nest(module.requires_grad_(False), in_spec, out_spec).eval()
    try:
        make_sizes(nested, found.inputs)
    except ValueError as error:
        raise CheckpointError(
            f"{path} holds no quantized network: {error}. Copy it anew, or quantize again."
        ) from error
    return Quantized(nested, found.sites, found.note)


def register_operators() -> None:
    """Make torch know every operator that a quantized graph may call."""
    with quiet_torchao():
        import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers `quantized_decomposed`
    for register in (
        quantize_operator,
        groups_operator,
        dynamic_operator,
        product_operator,
        lstm_operator,
        scan_operator,
    ):
        register()


def _read_head(path: Path) -> QuantizedFile:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Give a folder that `Quantized.save` or a quantizing `compress` wrote."
        ) from error
    written = data.get("format") if isinstance(data, dict) else None
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has the format {written!r}. This version of jettison reads {FORMAT!r}. Load it with the version "
            "that wrote it, or quantize again."
        )
    try:
        found: QuantizedFile = from_plain(QuantizedFile, data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} holds no quantized network: {error} Copy it anew, or quantize again.") from error
    return found


def _digest(file: QuantizedFile, tensors: Path) -> str:
    digest = hashlib.sha256(json.dumps(to_plain(replace(file, digest="")), sort_keys=True).encode())
    try:
        digest.update(tensors.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{tensors} cannot be read: {error}. Copy it anew, or quantize again.") from error
    return digest.hexdigest()


def _read_specs(module: GraphModule) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """Return how inputs and outputs are nested; a flat graph takes tensors and returns a tuple."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is not None:
        return info.in_spec, info.out_spec
    places = sum(node.op == "placeholder" for node in module.graph.nodes)
    results = next(node for node in module.graph.nodes if node.op == "output").args[0]
    leaves = pytree.tree_leaves(results)
    return pytree.tree_structure(((0,) * places, {})), pytree.tree_structure((0,) * len(leaves))
