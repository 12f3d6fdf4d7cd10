"""Attention on tensors of any number of dimensions in ONNX, and what is said of an operator that has no form there."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.core.errors import ExportError

KINDS = ("plain", "causal", "scale", "matrix", "batch", "float")


class Attention(nn.Module):
    """One attention on `rank` dimensions; "matrix" and "batch" are masks of truth values, "float" is one of numbers."""

    def __init__(self, rank: int, kind: str) -> None:
        super().__init__()
        self.first, self.rank, self.kind = nn.Linear(16, 16), rank, kind

    def forward(self, x: Tensor) -> Tensor:
        q = self.first(x)
        if self.rank == 2:
            q = q.flatten(0, 1)
        if self.rank >= 4:
            q = q.unflatten(-1, (2, 8)).transpose(1, 2)
        if self.rank == 5:
            q = q[:, None]
        length = q.shape[-2]
        mask = {
            "matrix": torch.ones(length, length, dtype=torch.bool).tril(),
            "batch": (q[..., :1] > 10).expand(*q.shape[:-1], length) | torch.eye(length, dtype=torch.bool),
            "float": q[..., :1] + torch.arange(length),
        }.get(self.kind)
        scale = 0.3 if self.kind == "scale" else None
        return nn.functional.scaled_dot_product_attention(
            q, 0.5 * q, q + 1, mask, is_causal=self.kind == "causal", scale=scale
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_attention_is_the_same_in_the_file(rank: int, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention(rank, kind).eval()
    path = jt.export(model, torch.randn(2, 5, 16), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(path))
    x = torch.randn(3, 5, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.from_numpy(found).sub(model(x)).abs().max() < 1e-5


class Grouped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, enable_gqa=True)


class Kth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.kthvalue(x, 2).values


@pytest.mark.parametrize(("model", "says"), [(Grouped(), "enable_gqa"), (Kth(), r"aten\.kthvalue")])
def test_what_cannot_be_written_is_named_with_its_line(model: nn.Module, says: str, tmp_path: Path) -> None:
    line = type(model).forward.__code__.co_firstlineno + 1
    with pytest.raises(ExportError, match=rf"{says}.* It stands in .*test_onnx_attention\.py:{line}\. Replace"):
        jt.export(model, torch.randn(2, 5, 16), tmp_path / "a.onnx")
