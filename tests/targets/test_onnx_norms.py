"""BatchNorms in float files: folded where a layer alone is read by one, left where somebody would notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import jettison as jt


def norm(channels: int, rank: int = 2) -> nn.Module:
    made: Any = (nn.BatchNorm1d if rank < 2 else nn.BatchNorm2d)(channels, eps=1e-2)
    for value in (made.running_mean, made.weight, made.bias):
        nn.init.normal_(value)
    nn.init.uniform_(made.running_var, 0.5, 3)
    return made  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One convolution under two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), norm(4), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.conv(torch.relu(self.first(self.conv(x)))))
        return y


class Read(nn.Module):
    """A convolution that a norm and the shortcut read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.relu(self.norm(y))


NETS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "convolution": (nn.Sequential(nn.Conv2d(4, 6, 3), norm(6), nn.ReLU()), (4, 8, 8), 0),
    "without bias": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), norm(6)), (4, 8, 8), 0),
    "rows": (nn.Sequential(nn.Conv1d(4, 6, 3), norm(6, 1)), (4, 8), 0),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), norm(6)), (4, 8, 8), 0),
    "transposed in groups": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), norm(6)), (4, 8, 8), 1),
    "linear": (nn.Sequential(nn.Linear(5, 6), norm(6, 1)), (5,), 0),
    "linear without bias": (nn.Sequential(nn.Linear(5, 6, bias=False), norm(6, 1)), (5,), 1),
    "norm first": (nn.Sequential(norm(4), nn.Conv2d(4, 6, 3)), (4, 8, 8), 1),
    "shared": (Shared(), (4, 8, 8), 2),
    "read twice": (Read(), (4, 8, 8), 1),
}


@pytest.mark.parametrize("name", list(NETS))
def test_folded_files_compute_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, shape, left = NETS[name]
    model, x = model.eval(), torch.randn(3, *shape)
    path = jt.export(model, x[:2], tmp_path / "net.onnx")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("BatchNormalization") == left
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = model(x)
    assert torch.from_numpy(found).sub(wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())


def test_layers_keep_their_names(tmp_path: Path) -> None:
    path = jt.export(NETS["without bias"][0].eval(), torch.randn(2, 4, 8, 8), tmp_path / "net.onnx")
    graph = onnx.load(path).graph
    assert [node.name for node in graph.node] == ["0"]
    assert sorted(i.name for i in graph.initializer) == ["0.bias", "0.weight"]
