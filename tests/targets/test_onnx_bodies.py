"""Networks with branches and regions, float and quantized, in ONNX: both ways of the branch, names, no leftovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.core.errors import TraceError
from jettison.targets.onnx_bodies import list_bodies, list_reads, rename_values

KINDS = ("float", "static", "dynamic", "weight-only", "fp16", "bf16")


class Branch(nn.Module):
    """torch.cond whose branches have layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cond(x.sum() > 20, lambda y: torch.tanh(self.wide(y)), lambda y: torch.sigmoid(self.narrow(y)), (x,))
        logits: Tensor = self.head(x)
        return logits


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        def choose(y: Tensor) -> Tensor:
            return torch.cond(y.sum() > 4, lambda z: torch.relu(z), lambda z: torch.tanh(z), (self.first(y),))

        return torch.cond(x.sum() > 2, choose, lambda y: torch.sigmoid(self.second(y)), (x,))


class Regions(nn.Module):
    """Modes that change no number on a CPU: no gradients, autocast off, and autocast of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(12, 32), nn.Linear(32, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            x = torch.relu(self.stem(x))
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            x, y = torch.relu(self.inner(x)), x.mean()
        logits: Tensor = self.head(x) + y
        return logits


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


def scale_inputs() -> list[Tensor]:
    """Inputs that take each way through `Branch`."""
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    return [0.3 * x, 3 * x]


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # torch's own, of a region for a GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [Branch, Regions])
def test_every_kind_is_as_simulated_on_each_way(build: type[nn.Module], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = build().eval(), scale_inputs()
    layers = ["stem", "inner", "head"] if build is Regions else ["stem", "head"]
    module = model
    if kind != "float":
        found = jt.quantize(model, inputs, kind=kind)
        assert [site.layer for site in found.sites if site.bits < 32] == layers
        module = found.module
    path = jt.export(module, inputs[0], tmp_path / "net.onnx")
    for x in inputs:
        with torch.no_grad():
            wanted = model(x)
            simulated = module(x)
            # ONNX Runtime rounds the inputs of grouped weights of its own accord.
            most = (2e-2 if kind == "weight-only" else 1e-5) * wanted.abs().max()
            assert run(path, x).sub(simulated).abs().max() <= most
            assert simulated.sub(wanted).norm() < 0.25 * wanted.norm()


def test_each_way_is_taken() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    with torch.no_grad():
        sums = [float(torch.relu(model.stem(x)).sum()) for x in scale_inputs()]
    assert sums[0] < 20 < sums[1]


def test_layers_in_branches_keep_their_names(tmp_path: Path) -> None:
    path = jt.export(Branch().eval(), scale_inputs()[0], tmp_path / "net.onnx")
    model = onnx.load(path)
    names: list[str] = []

    def collect(graph: Any) -> None:
        for node in graph.node:
            assert not node.metadata_props and not node.doc_string
            names.append(node.name)
            for body in list_bodies(node):
                collect(body)

    collect(model.graph)
    assert {"stem", "wide", "narrow", "head"} < set(names) and len(names) == len(set(names))
    assert any(name.startswith("if_") and ".then." in name for name in names)


def test_reads_of_bodies_are_seen_and_renamed() -> None:
    make = onnx.helper.make_node
    y, outer = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("y", "outer"))
    nodes = [make("Add", ["outer", "own"], ["made"]), make("Mul", ["made", "w"], ["y"])]
    own = onnx.helper.make_tensor("own", onnx.TensorProto.FLOAT, [1], [1.0])
    body = onnx.helper.make_graph(nodes, "body", [], [y], [own])
    passing = onnx.helper.make_graph([], "passing", [], [outer])
    node = make("If", ["c"], ["z"], then_branch=body, else_branch=passing)
    assert set(list_reads(node)) == {"c", "outer", "w"}
    rename_values(node, {"outer": "new", "w": "v", "c": "d"})
    assert set(list_reads(node)) == {"d", "new", "v"}


def test_a_branch_in_a_branch_is_refused_with_its_line() -> None:
    with pytest.raises(TraceError, match=rf"torch\.cond inside .*{Path(__file__).name}:\d+"):
        jt.quantize(Nested().eval(), scale_inputs())
