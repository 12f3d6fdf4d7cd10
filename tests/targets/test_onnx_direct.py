"""The direct ONNX writer: every form computes what PyTorch does, and its files are as good as torch's exporter's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jettison as jt
from jettison.graph.trace import trace_module
from jettison.targets import onnx_direct, onnx_file, onnx_forms, onnxruntime

ROUNDING = 1e-5
"""Relative to the largest output: float32 sums in another order."""
Function = Callable[[Tensor], Tensor]
INTEGER_ONLY = {
    "jettison.quantize_per_tensor.default",
    "jettison.linear_dynamic.default",
    "quantized_decomposed.dequantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_channel.default",
}


class Call(nn.Module):
    """Calls a function that may use a weight of `shape`."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


def attend_to_some(x: Tensor, w: Tensor) -> Tensor:
    mask = (w + w.abs().transpose(0, 1)).clamp(min=0).to(torch.bool)
    return F.scaled_dot_product_attention(x, x, x, mask)


def normalise(channels: int, norm: type[nn.Module], **options: Any) -> nn.Module:
    """A BatchNorm that has seen something."""
    made: Any = norm(channels, **options)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made  # type: ignore[no-any-return]


def look_up_bias(x: Tensor, w: Tensor) -> Tensor:
    """Attention with a bias by relative position, as in Swin: all of it hangs on the weight."""
    places = torch.arange(5)[:, None] - torch.arange(5)[None] + 4
    bias = w[places.view(-1)].view(5, 5, 1).permute(2, 0, 1).contiguous()
    return (x @ x.transpose(1, 2) + bias).softmax(-1) @ x


PICTURE, ROWS, FLAT = (6, 8, 10), (5, 12), (12,)
SOLID = (4, 6, 8, 4)
WHOLE: dict[str, tuple[tuple[int, ...], nn.Module | Function]] = {
    "conv1d": (ROWS, nn.Conv1d(5, 4, 3, 2, 1)),
    "conv1d-same": (ROWS, nn.Conv1d(5, 4, 4, padding="same")),
    "conv2d": (PICTURE, nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), groups=2, bias=False)),
    "conv2d-same": (PICTURE, nn.Conv2d(6, 4, 4, padding="same", dilation=2)),
    "conv2d-valid": (PICTURE, nn.Conv2d(6, 4, 3, padding="valid")),
    "conv3d": (SOLID, nn.Conv3d(4, 6, (1, 3, 2), 2, (0, 1, 1))),
    "conv3d-same": (SOLID, nn.Conv3d(4, 6, 3, padding="same", groups=2)),
    "conv_transpose1d": (ROWS, nn.ConvTranspose1d(5, 4, 3, 2)),
    "conv_transpose3d": (SOLID, nn.ConvTranspose3d(4, 6, 2, 2)),
    "conv_transpose2d": (PICTURE, nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)),
    "linear": (FLAT, nn.Linear(12, 7)),
    "linear-rows": (ROWS, nn.Linear(12, 7, bias=False)),
    "linear-flat-without-bias": (FLAT, nn.Linear(12, 7, bias=False)),
    "matmul": (ROWS, lambda x: x @ x.transpose(1, 2)),
    "bmm": (ROWS, lambda x: torch.bmm(x, x.transpose(1, 2))),
    "attention": (PICTURE, lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1)),
    "attention-mask": (
        PICTURE,
        lambda x: F.scaled_dot_product_attention(x, x, x, (x @ x.transpose(2, 3)).tanh(), scale=0.3),
    ),
    "relu": (FLAT, F.relu),
    "sigmoid": (FLAT, torch.sigmoid),
    "tanh": (FLAT, torch.tanh),
    "exp": (FLAT, torch.exp),
    "sqrt": (FLAT, lambda x: (x * x).sqrt()),
    "neg": (FLAT, torch.neg),
    "hardswish": (FLAT, lambda x: F.hardswish(3 * x)),
    "relu6": (FLAT, lambda x: F.relu6(5 * x)),
    "hardtanh": (FLAT, lambda x: F.hardtanh(x, -0.5, 2.0)),
    "clamp": (FLAT, lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) - x.clamp(max=0.2)),
    "leaky_relu": (FLAT, lambda x: F.leaky_relu(x, 0.2)),
    "silu": (FLAT, F.silu),
    "hardsigmoid": (FLAT, lambda x: F.hardsigmoid(3 * x)),
    "gelu": (FLAT, F.gelu),
    "softmax": (ROWS, lambda x: x.softmax(1)),
    "layer_norm": (ROWS, nn.LayerNorm((5, 12), 1e-3)),
    "batch_norm": (PICTURE, normalise(6, nn.BatchNorm2d, eps=0.1)),
    "batch_norm-plain": (ROWS, normalise(5, nn.BatchNorm1d, affine=False)),
    "group_norm": (PICTURE, nn.GroupNorm(3, 6, 1e-2)),
    "group_norm-rows-plain": (ROWS, nn.GroupNorm(1, 5, affine=False)),
    "sin-cos": (FLAT, lambda x: x.sin() + (2 * x).cos()),
    "powers": (FLAT, lambda x: (x * x + 1).rsqrt() + x**2 + x.abs() ** 0.5),
    "amax": (ROWS, lambda x: x.amax(1, keepdim=True) + x.amax((1, 2), keepdim=True)),
    "norms": (ROWS, lambda x: F.normalize(x, dim=-1) + torch.linalg.vector_norm(x, 1, 1, True)),
    "where": (FLAT, lambda x: torch.where(x.clamp(min=0).to(torch.bool), x, 2 * x)),
    "masked_fill": (FLAT, lambda x: x.masked_fill(x.clamp(min=0).to(torch.bool), -3.0)),
    "arithmetic": (FLAT, lambda x: (x * 2 - 3) / (x * x + 1) + (1 - x) - x / 7),
    "arithmetic-types": (FLAT, lambda x: x + (x * 3).to(torch.int64) * 2),
    "mean-picture": (PICTURE, lambda x: x.mean((-1, 2))),
    "mean-kept": (PICTURE, lambda x: x.mean((2, 3), keepdim=True)),
    "mean-rows": (ROWS, lambda x: x.mean(1)),
    "sum": (ROWS, lambda x: x.sum(-1, keepdim=True) + x.sum((1, 2), keepdim=True)),
    "adaptive_avg_pool2d": (PICTURE, nn.AdaptiveAvgPool2d(1)),
    "adaptive_avg_pool1d": (ROWS, nn.AdaptiveAvgPool1d(4)),
    "adaptive_avg_pool2d-parts": (PICTURE, nn.AdaptiveAvgPool2d((4, 2))),
    "adaptive_avg_pool3d": (SOLID, nn.AdaptiveAvgPool3d((1, 4, 2))),
    "upsample_nearest2d": (PICTURE, lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (16, 20))),
    "upsample_bilinear2d": (PICTURE, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "upsample_bilinear2d-corners": (
        PICTURE,
        lambda x: F.interpolate(x, (24, 20), mode="bilinear", align_corners=True),
    ),
    "upsample_bilinear2d-half": (PICTURE, lambda x: F.interpolate(x, scale_factor=(0.5, 1.5), mode="bilinear")),
    "upsample_bilinear2d-odd": (PICTURE, lambda x: F.interpolate(x, (13, 7), mode="bilinear")),
    "max_pool3d": (SOLID, nn.MaxPool3d((1, 3, 2), 2, (0, 1, 1))),
    "max_pool2d-even-ceil": (PICTURE, nn.MaxPool2d(2, 2, ceil_mode=True)),
    "avg_pool2d-even-ceil": (PICTURE, nn.AvgPool2d((2, 3), (2, 1), (0, 1), ceil_mode=True)),
    "max_pool2d": (PICTURE, nn.MaxPool2d(3, 2, 1)),
    "max_pool2d-dilated": (PICTURE, nn.MaxPool2d((2, 3), dilation=2)),
    "avg_pool2d": (PICTURE, nn.AvgPool2d(3, 2, 1)),
    "avg_pool2d-outside": (PICTURE, nn.AvgPool2d(2, padding=1, count_include_pad=False)),
    "shapes": (PICTURE, lambda x: x.flatten(2).view(x.shape[0], 2, 3, 80).reshape(-1, 240).unsqueeze(1)),
    "more shapes": (
        PICTURE,
        lambda x: torch.ops.aten._unsafe_view(x.unflatten(-1, (2, 5)).reshape_as(x)[:, :1].squeeze(1), [-1, 4, 20]),
    ),
    "stack": (ROWS, lambda x: torch.stack([x, x * 2], -1) + torch.stack([x, -x], 3)),
    "roll": (PICTURE, lambda x: x.roll((1, -3), (2, 3)).roll(0, 1)),
    "casts": (FLAT, lambda x: x.to("cpu") + x.to(torch.int64).type_as(x) + x.to(x.dtype, copy=True)),
    "copies": (
        ROWS,
        lambda x: (
            torch.ops.aten.alias(x.transpose(1, 2).contiguous())
            + torch.ops.aten._to_copy(x.transpose(1, 2), dtype=torch.float64).to(torch.device("cpu"), torch.float32)
        ),
    ),
    "made": (ROWS, lambda x: x * torch.arange(12) + torch.linspace(0, 1, 12).sin()),
    "permute": (PICTURE, lambda x: x.permute(0, 3, 1, 2).transpose(-1, 1)),
    "cat": (ROWS, lambda x: torch.cat([x, x * 2, x[:, :2]], 1)),
    "parts": (ROWS, lambda x: x[:, 1, 1::2] + x[:, -2:, ::2].sum(1)),
    "split": (ROWS, lambda x: x.split([2, 3], 1)[1] * x.chunk(2, 1)[0] + x.split(2, 1)[2]),
    "unbind": (ROWS, lambda x: x.unbind(1)[3] - x.unbind(1)[0]),
    "pads": (PICTURE, lambda x: F.pad(x, (1, 0, 2, 3), value=0.5) + torch.constant_pad_nd(x, (1, 0, 2, 3))),
    "pads-negative": (PICTURE, lambda x: F.pad(x, (-1, 2, 1, -3)) + F.pad(x, (0, 1, -2, 0))),
    "passes": (FLAT, lambda x: F.dropout(x, 0.5, False).detach().clone().contiguous()),
}
WITH_WEIGHT: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    "expand": (ROWS, (1, 1, 12), lambda x, w: torch.cat([w.expand(x.shape[0], 2, -1), x], 1)),
    "expand-fixed": (ROWS, (5, 1), lambda x, w: x * w.expand(5, 12)),
    "attention-bool": (PICTURE, (8, 1), attend_to_some),
    "table": (ROWS, (9, 1), look_up_bias),
    "embedding": (FLAT, (9, 4), lambda x, w: F.embedding(x.abs().clamp(max=2).to(torch.int64), w)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in WITH_WEIGHT:
        sizes, weight, function = WITH_WEIGHT[name]
        return Call(function, *weight).eval(), torch.randn(4, *sizes)
    sizes, whole = WHOLE[name]
    return (whole if isinstance(whole, nn.Module) else Call(whole)).eval(), torch.randn(4, *sizes)


def compare(name: str, path: Path, used: set[str] | None = None) -> float:
    """Return the largest difference between PyTorch and the written file, as a share of the largest output."""
    model, x = make(name)
    traced = trace_module(model, (x[:2],))
    if used is not None:
        used.update(str(n.target) for n in traced.module.graph.nodes)
    proto = onnx_direct.write(
        traced.module, traced.example, input_names=["x"], output_names=["y"], dynamic=traced.dynamic_batch, opset=18
    )
    assert proto is not None, f"{name} has no form"
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    session, worst = onnxruntime.load(path, threads=1), 0.0
    for rows in (1, 4):
        with torch.no_grad():
            wanted = model(x[:rows]).numpy()
        (found,) = session.run([x[:rows].numpy()])
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return worst


@pytest.mark.parametrize("name", [*WHOLE, *WITH_WEIGHT])
def test_a_form_computes_what_pytorch_does(tmp_path: Path, name: str) -> None:
    assert compare(name, tmp_path / "net.onnx") < ROUNDING


def test_every_form_is_compared(tmp_path: Path) -> None:
    used = set(INTEGER_ONLY)
    for name in (*WHOLE, *WITH_WEIGHT):
        compare(name, tmp_path / "net.onnx", used)
    assert set(onnx_forms.FORMS) <= used


@pytest.mark.parametrize(
    ("name", "operator", "wrong"),
    [
        ("unbind", "aten.unbind.int", lambda d, n, x, dim: onnx_forms._unbind(d, n, x, dim)[::-1]),
        ("gelu", "aten.gelu.default", partial(onnx_forms._apply, "Tanh")),
        ("arithmetic", "aten.div.Tensor", partial(onnx_forms._combine, "Mul")),
    ],
)
def test_a_wrong_form_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, operator: str, wrong: onnx_forms.Form
) -> None:
    monkeypatch.setitem(onnx_forms.FORMS, operator, wrong)
    with pytest.raises(AssertionError):
        assert compare(name, tmp_path / "net.onnx") < ROUNDING


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(1),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.max_pool2d(x[:, None], 2, ceil_mode=True),
        lambda x: x.mean((1,), dtype=torch.float64),
        lambda x: x.reshape(x.shape[0], 2, -1).transpose(0, 1).reshape(2 * x.shape[0], -1)[: x.shape[0]],
    ],
)
def test_what_has_no_form_is_left_to_the_other_writer(function: Function) -> None:
    traced = trace_module(Call(function), (torch.randn(2, 5, 12),))
    given = {"input_names": ["x"], "output_names": ["y"], "dynamic": True, "opset": 18}
    assert onnx_direct.write(traced.module, traced.example, **given) is None  # type: ignore[arg-type]


def test_an_output_may_be_an_input_a_constant_or_given_twice(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.arange(3.0))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x.relu()
            return x, self.kept, y, y

    traced = trace_module(Odd(), (torch.randn(2, 3),))
    names = ["a", "b", "c", "d"]
    proto = onnx_direct.write(
        traced.module, traced.example, input_names=["x"], output_names=names, dynamic=True, opset=18
    )
    assert proto is not None
    onnx.save(proto, tmp_path / "odd.onnx")
    x = np.float32([[-1, 0, 2]])
    found = onnxruntime.load(tmp_path / "odd.onnx", threads=1).run([x])
    for array, wanted in zip(found, (x, np.arange(3, dtype=np.float32), x.clip(0), x.clip(0)), strict=True):
        assert np.array_equal(array, wanted)


class Text(nn.Module):
    """An encoder block on token numbers with a mask, and a mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shares = mask.to(torch.float32)
        x = self.words(ids)
        query, key, value = self.mix(x).view(x.shape[0], 6, 2, 24).transpose(1, 2).chunk(3, -1)
        scores = query @ key.transpose(2, 3) / 3 + (1.0 - shares)[:, None, None, :] * -100.0
        x = self.norm(x + self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape[0], 6, 16)))
        return self.head((x * shares[:, :, None]).sum(1) / shares.sum(1, keepdim=True))


def make_text() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    ids = torch.randint(20, (16, 6))
    return Text().eval(), (ids, (torch.arange(6) <= torch.arange(16)[:, None] % 6).long())


def make_pictures() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1, groups=8)]
    layers += [nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).eval(), (torch.randn(16, 3, 12, 12),)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "kind"), [(make_text, "static"), (make_text, "dynamic"), (make_pictures, "static")])
def test_both_writers_give_the_same_numbers_and_kernels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]],
    kind: str,
) -> None:
    model, data = build()
    quantized = jt.quantize(model, [data], kind=kind)
    first = tuple(x[:1] for x in data)
    calls: list[bool] = []

    def watch(*args: object, **options: object) -> onnx.ModelProto | None:
        proto = onnx_direct.write(*args, **options)  # type: ignore[arg-type]
        calls.append(proto is not None)
        return proto

    monkeypatch.setattr(onnx_file, "write", watch)
    jt.export(quantized.module, first, tmp_path / "direct.onnx")
    assert calls == [True]
    monkeypatch.setattr(onnx_file, "write", lambda *args, **options: None)
    jt.export(quantized.module, first, tmp_path / "traced.onnx")
    files = [tmp_path / "direct.onnx", tmp_path / "traced.onnx"]
    assert b"torch" not in files[0].read_bytes()  # else both came from one writer
    kernels = [Counter(o.kernel for o in onnxruntime.list_operators(f, None, threads=1)) for f in files]
    for moving in ("Reshape", "Transpose", "Slice", "Split", "Unsqueeze", "Concat", "Shape"):
        assert kernels[0].pop(moving, 0) <= kernels[1].pop(moving, 0) + 1
    assert kernels[0] == kernels[1]
    for rows in (1, 5):
        arrays = [x[:rows].numpy() for x in data]
        ours, theirs = (onnxruntime.load(f, threads=1).run(arrays)[0] for f in files)
        assert np.array_equal(ours, theirs)
