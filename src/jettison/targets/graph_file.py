"""A graph as one file for the targets that run in PyTorch itself: the saved graph, packed, with its names."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, ExportError, JettisonError
from jettison.core.plain import write_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

SUFFIX = ".graph"
MEMBERS = ("model.json", "model.safetensors", "about.json")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""So that the same network gives the same bytes."""


@dataclass(frozen=True)
class GraphFile:
    """What `open_graph` found; shapes hold None where a dimension is free."""

    module: GraphModule
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]


def export(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool,
) -> None:
    """Write a float graph as a packed folder of JSON and safetensors, whole or not at all; no code is stored.

    Raises ExportError for a converted graph (operator by operator, PyTorch would compute it in float) and for what the
    graph's store refuses, StorageError where the file cannot be written.
    """
    from jettison.targets.converted import is_converted

    if is_converted(module):
        raise ExportError(
            "A network on integers cannot be written for PyTorch itself. Its CPU kernels would not run it on integers. "
            "Export the float network, or choose a target that has int8."
        )
    write(module, inputs, path, input_names=input_names, output_names=output_names, dynamic_batch=dynamic_batch)


def write(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool,
) -> None:
    """Write a graph, float or spelled for PT2E, as `export` does; raises what it raises, but for integers."""
    from torch.utils import _pytree as pytree

    from jettison.graph.store import save_graph

    about = {
        "inputs": [
            {"name": name, "shape": [None if dynamic_batch else x.shape[0], *x.shape[1:]]}
            for name, x in zip(input_names, inputs, strict=True)
        ],
        "outputs": list(output_names),
    }
    in_spec = pytree.tree_structure((tuple(inputs), {}))
    out_spec = pytree.tree_structure(tuple(output_names))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_graph(module, in_spec, out_spec, folder)
        (folder / "about.json").write_text(json.dumps(about, sort_keys=True))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as file:
            for member in MEMBERS:
                file.writestr(zipfile.ZipInfo(member, _EPOCH), (folder / member).read_bytes())
    write_bytes(packed.getvalue(), path)


def open_graph(path: Path) -> GraphFile:
    """Read what `write` wrote; raises CheckpointError where the file is cut, changed or something else."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers the operators of int8

    from jettison.graph.store import load_graph

    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as name:
            for member in MEMBERS:
                (Path(name) / member).write_bytes(file.read(member))
            about: dict[str, Any] = json.loads((Path(name) / "about.json").read_text())
            module, _, _ = load_graph(Path(name))
        return GraphFile(
            module.requires_grad_(False),
            tuple(i["name"] for i in about["inputs"]),
            tuple(tuple(i["shape"]) for i in about["inputs"]),
            tuple(about["outputs"]),
        )
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError) as error:
        if isinstance(error, JettisonError) and not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is no network that PyTorch can load: {error}. It may be cut short. Export it anew."
        ) from error
